"""lockstep itself: `lockstep bench` for speeds, `lockstep generate` for cold starts and memory."""
from .base import LONG_PROMPT, SHORT_PROMPT, Engine, run, run_json


class Lockstep(Engine):
    def __init__(self, binary, precision="exact"):
        super().__init__("lockstep" if precision == "exact" else f"lockstep {precision}")
        self.binary, self.precision = binary, precision

    def measure(self, task, model, setting):
        common = ["-m", model.path, "-t", task.threads, "--precision", self.precision]
        if task.kind in ("cold", "memory"):
            prompt, tokens = (SHORT_PROMPT, 1) if task.kind == "cold" else (LONG_PROMPT, 32)
            ran = run([self.binary, "generate", *common, "--raw", "-p", prompt, "-n", tokens])
            return {"value": ran.first_ms if task.kind == "cold" else ran.peak_mb}
        prefill, decode = (task.prefill, 1) if task.kind == "prefill" else (1, task.decode)
        got = run_json([self.binary, "bench", *common, "--prefill", prefill, "--decode", decode, "--depth", task.depth,
                        "--streams", task.streams, "--repeat", 1, "--json"])
        out = {"value": got["prefill_tps" if task.kind == "prefill" else "decode_tps"], "isa": got["isa"]}
        if not task.busy:    # nothing to compare with a limit that the neighbour took half of
            out["limits"] = got["limits"]
        if task.kind == "prefill":
            out["gop_per_token"] = got["prefill_gops"] / got["prefill_tps"]
        elif task.streams == 1:
            out["gb_per_token"] = got["token_bytes"] / 1e9
        return out

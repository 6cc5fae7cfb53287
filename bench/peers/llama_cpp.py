"""llama.cpp: llama-bench for speeds, llama-batched-bench for streams, llama-completion for cold starts and memory."""
import json

from .base import BENCH, LONG_PROMPT, SHORT_PROMPT, Engine, Unable, few_words, run, run_json

BIN = BENCH / "llama.cpp" / "bin"
REPACKED = ("q4_0", "q8_0", "q4_k_m")    # formats that it can keep in another order of its own


class LlamaCpp(Engine):
    def __init__(self):
        super().__init__("llama.cpp")

    def refuses(self, task, model):
        if model.path.suffix != ".gguf":
            return "reads GGUF only"

    def axes(self, task, model):
        repack = {"repack": (1, 0)} if model.format in REPACKED else {}
        if task.kind == "memory":
            return {}    # as it comes
        if task.kind == "cold":
            return repack
        if task.kind == "prefill":
            return {"fa": (1, 0), "ub": (512, 256, 128), **repack}
        if task.depth:
            return {"fa": (1, 0)}
        # OpenMP's threads spin between operations unless told to sleep, which may be better beside a neighbour.
        return {"fa": (1, 0), **repack, **({"wait": ("spin", "sleep")} if task.busy else {})}

    def measure(self, task, model, setting):
        environment = {"OMP_WAIT_POLICY": "passive"} if setting.get("wait") == "sleep" else {}
        if task.kind in ("cold", "memory"):
            return self.complete(task, model, setting)
        if task.kind == "streams":
            return self.streams(task, model, setting)
        prompt, tokens = (task.prefill, 0) if task.kind == "prefill" else (0, task.decode)
        got = run_json([BIN / "llama-bench", "-m", model.path, "-t", task.threads, "-p", prompt, "-n", tokens, "-d", task.depth,
                        "-r", 1, "-o", "json", "-fa", setting.get("fa", 1), "-ub", setting.get("ub", 512),
                        "--repack", setting.get("repack", 1)], environment)
        return {"value": got[0]["avg_ts"]}

    def streams(self, task, model, setting):
        needed = task.streams * (task.depth + task.decode)
        ran = run([BIN / "llama-batched-bench", "-m", model.path, "-t", task.threads, "-c", needed, "-npp", task.depth,
                   "-ntg", task.decode, "-npl", task.streams, "-fa", "on" if setting.get("fa", 1) else "off", "-fit", "off",
                   "--repack" if setting.get("repack", 1) else "--no-repack", "--output-format", "jsonl"])
        lines = [line for line in ran.out.splitlines() if line.startswith("{")]
        if not lines:
            raise Unable(few_words(ran.error))
        return {"value": json.loads(lines[-1])["speed_tg"]}

    def complete(self, task, model, setting):
        prompt, tokens = (SHORT_PROMPT, 1) if task.kind == "cold" else (LONG_PROMPT, 32)
        ran = run([BIN / "llama-completion", "-m", model.path, "-t", task.threads, "-c", 512, "-fit", "off", "-no-cnv",
                   "--no-display-prompt", "--no-warmup", "--temp", 0, "-n", tokens, "-p", prompt,
                   "--repack" if setting.get("repack", 1) else "--no-repack"])
        return {"value": ran.first_ms if task.kind == "cold" else ran.peak_mb}

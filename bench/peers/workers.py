"""Engines that are Python packages: each model is loaded once in a process of its own, which is then asked round by round."""
import contextlib
import json
import subprocess
import tempfile
from pathlib import Path

from .base import BENCH, REFERENCE_PYTHON, Engine, Unable, few_words

HERE = Path(__file__).resolve().parent


class Worker(Engine):
    """`script` runs under `python`; see serve.py for what they say to each other."""
    script, python, most_prefill, most_decode = "", REFERENCE_PYTHON, None, None
    kinds = ("decode", "prefill", "memory")

    def __init__(self, name):
        super().__init__(name)
        self.process = self.errors = None

    def refuses(self, task, model):
        if task.kind not in self.kinds:
            return "not measured"

    def open(self, task, model, setting):
        self.errors = tempfile.TemporaryFile()
        command = [self.python, HERE / self.script, self.path(model), "--threads", task.threads]
        for key, value in setting.items():
            command += ["--set", f"{key}={value}"]
        if not Path(self.python).exists():
            raise Unable("not installed: run bench/environment")
        self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True)
        self.answer()
        if task.kind != "memory":
            self.ask(task)    # shapes are compiled, caches filled

    def path(self, model):
        return model.path

    def answer(self):
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):    # what libraries print
            line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            raise Unable(few_words(self.errors.read().decode(errors="replace")) if status >= 0 else f"killed by signal {-status}")
        got = json.loads(line)
        if "error" in got:
            raise Unable(few_words(got["error"]))
        return got

    def ask(self, task):
        prefill = task.prefill if task.kind == "prefill" else task.depth or 8
        decode = 1 if task.kind == "prefill" else task.decode
        if task.kind == "memory":
            prefill, decode = 300, 32
        asked = {"prefill": min(prefill, self.most_prefill or prefill), "decode": min(decode, self.most_decode or decode)}
        with contextlib.suppress(BrokenPipeError):    # it has died: its last words are read below
            print(json.dumps(asked), file=self.process.stdin, flush=True)
        return self.answer(), asked

    def measure(self, task, model, setting):
        got, asked = self.ask(task)
        key = {"prefill": "prefill_tps", "memory": "peak_mb"}.get(task.kind, "decode_tps")
        return {"value": got[key], "asked": asked}

    def close(self):
        if self.process:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.errors.close()
            self.process = None


class OpenVino(Worker):
    """Reads the same GGUF files."""
    script, python = "serve_openvino.py", BENCH / "env" / "bin" / "python"

    def __init__(self):
        super().__init__("OpenVINO GenAI")

    def refuses(self, task, model):
        if model.path.suffix != ".gguf":
            return "reads GGUF only"
        if model.experts:
            return "reads no Mixtral GGUF"
        if model.format == "bf16":
            return "reads no BF16 GGUF"
        return super().refuses(task, model)

    def axes(self, task, model):
        if task.kind == "memory":
            return {}
        return {"attention": ("PA", "SDPA"), "precision": ("bf16", "f32")}


class Transformers(Worker):
    """Weights in bf16, from the Hugging Face folder that holds the numbers of the GGUF file."""
    script = "serve_transformers.py"

    def __init__(self):
        super().__init__("transformers")

    def refuses(self, task, model):
        if not model.hf:
            return "measured on BF16"
        return super().refuses(task, model)

    def path(self, model):
        return model.hf

    def axes(self, task, model):
        return {"experts": ("grouped_mm", "eager")} if model.experts and task.kind != "memory" else {}


class MlxLm(Worker):
    """A few tokens only: it takes a second for each."""
    script, most_prefill, most_decode = "serve_mlx.py", 16, 4

    def __init__(self):
        super().__init__("mlx-lm")

    def refuses(self, task, model):
        if model.format != "mlx4":
            return "reads MLX folders"
        return super().refuses(task, model)

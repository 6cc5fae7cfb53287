"""What the engines under measurement have in common: tasks, running a command and reading what it took."""
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "build" / "bench"
REFERENCE_PYTHON = ROOT / "build" / "reference-env" / "bin" / "python"

# Eight tokens of SmolLM2's vocabulary; three hundred.
SHORT_PROMPT = "The quick brown fox jumps over the lazy"
LONG_PROMPT = "word " * 300


class Unable(Exception):
    """An engine cannot run this; says why in a few words."""


@dataclass(frozen=True)
class Task:
    name: str
    title: str             # with the numbers below in braces
    kind: str              # decode, prefill, streams, cold, memory
    models: tuple
    engines: tuple         # their names, as bench/peers/__init__.py has them
    prefill: int = 512
    decode: int = 64
    depth: int = 0         # tokens already in the context
    streams: int = 1
    threads: int = 0       # 0: all
    busy: bool = False     # beside a process that spins

    @property
    def heading(self):
        return self.title.format(**vars(self))

    @property
    def unit(self):
        return {"cold": "ms", "memory": "MB"}.get(self.kind, "tokens/s")

    @property
    def less_is_better(self):
        return self.kind in ("cold", "memory")


@dataclass(frozen=True)
class Model:
    name: str        # smollm2, 1b-q4_0, ...
    path: Path
    hf: Path | None = None    # the same weights as a Hugging Face folder, for transformers

    @property
    def format(self):
        return "q4_1" if self.name == "smollm2" else self.name.rpartition("-")[2]

    @property
    def experts(self):
        return self.name.startswith("mixtral")


@dataclass
class Ran:
    out: str
    error: str
    first_ms: float    # from the start of the process to the first byte of its output, or to its end
    peak_mb: float


def few_words(text):
    """The last line that says something, without what stands in brackets before it, cut short."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    last = last.split("] ", 1)[-1].split(" (see ", 1)[0]
    return last if len(last) <= 90 else last[:87] + "..."


def run(command, environment=None):
    """Runs a command to its end. This process is small, so that the kernel's count of the child's memory is the child's."""
    with tempfile.TemporaryFile() as error:
        start = time.perf_counter()
        try:
            process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=error,
                                       env={**os.environ, **(environment or {})})
        except OSError as failure:
            raise Unable(f"{Path(command[0]).name}: {failure.strerror.lower()}") from None
        with process:
            first = process.stdout.read(1)
            first_ms = (time.perf_counter() - start) * 1e3
            rest = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        error.seek(0)
        said = error.read().decode(errors="replace")
    if process.returncode:
        raise Unable(few_words(said) if process.returncode > 0 else f"killed by signal {-process.returncode}")
    return Ran((first + rest).decode(errors="replace"), said, first_ms, usage.ru_maxrss * 1024 / 1e6)


def run_json(command, environment=None):
    ran = run(command, environment)
    try:
        return json.loads(ran.out)
    except json.JSONDecodeError:
        raise Unable(f"no JSON: {few_words(ran.error)}") from None


class Engine:
    """One engine as the tasks see it."""

    def __init__(self, name):
        self.name = name

    def refuses(self, task, model):
        """Why it cannot run this, in a few words; None if it may."""

    def axes(self, task, model):
        """Settings that a sweep tries, one after the other: {name: values, the default first}."""
        return {}

    def open(self, task, model, setting):
        """Whatever must be loaded once for all rounds."""

    def measure(self, task, model, setting):
        """-> {"value": in the task's unit, ...}. Unable if it cannot."""
        raise NotImplementedError

    def close(self):
        """Undoes open; may be called twice."""

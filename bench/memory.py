#!/usr/bin/env python3
"""Resident memory of a run beside what it must hold: stored weights + KV cache in use + tokenizer + 64 MB + 5 %.

    bench/memory.py                                          # SmolLM2 and the Mixtrals that scripts/test makes
    bench/memory.py build/bench/models/1b-q4_0.gguf          # exit status 1 if one is over
"""
import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKSTEP = ROOT / "build" / "release" / "lockstep"
PROMPT = "word " * 300


def peak_mb(*arguments):
    """Largest resident size of a run, in MB; and what it wrote to stderr. Measured from a process of its own, because
    the kernel counts a parent's size to a child's."""
    script = ("import resource, subprocess, sys\n"
              "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
              "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    run = subprocess.run([sys.executable, "-c", script, str(LOCKSTEP), *arguments], check=True, capture_output=True, text=True)
    return int(run.stdout) * 1024 / 1e6, run.stderr


def check(model):
    facts = subprocess.run([LOCKSTEP, "inspect", model], check=True, capture_output=True, text=True).stdout
    stored = float(re.search(r"parameters .* in ([\d.]+) MB", facts)[1])
    kv_per_thousand = float(re.search(r"KV cache ([\d.]+) MB", facts)[1])
    tokenizer, _ = peak_mb("tokenize", "-m", model, "--text", "one")
    used, line = peak_mb("generate", "-m", model, "--raw", "-p", PROMPT, "-n", "32")
    tokens = sum(map(int, re.search(r"(\d+) prompt \+ (\d+) new", line).groups()))
    kv = kv_per_thousand * tokens / 1000
    bound = (stored + kv + tokenizer + 64) * 1.05
    print(f"{model}: {used:.0f} MB; weights {stored:.0f} + KV of {tokens} tokens {kv:.0f} + tokenizer {tokenizer:.0f} "
          f"+ 64, + 5 % = {bound:.0f} MB")
    return used <= bound


def main():
    made = [str(ROOT / "build" / "models" / name) for name in ("mixtral", "mixtral.gguf")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["smollm2", *made],
                        help="file, folder or name (default: smollm2, build/models/mixtral, build/models/mixtral.gguf)")
    return 0 if all([check(model) for model in parser.parse_args().models]) else 1


if __name__ == "__main__":
    sys.exit(main())

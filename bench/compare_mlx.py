#!/usr/bin/env python3
"""The 4-bit Mixtral of mlx-lm: accuracy of lockstep on it, and decode speed beside mlx-lm's own.

    scripts/reference-env && scripts/test            # once: the environment, the binary, build/models/mixtral
    bench/compare_mlx.py [--rounds 3] [--tokens 6]

Quantises build/models/mixtral with mlx-lm (4 bits, groups of 64), computes transformers' f32 logits on mlx's own
dequantised weights for 96 tokens of text, and prints the NMSE of `lockstep logits` over the whole vocabulary. Then
both engines decode in turn. Exit 1 if an NMSE is beyond its bound.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts" / "fixtures"), str(ROOT / "scripts")]

import reference_python  # noqa: F401: has the packages below
import mlx.core as mx
import numpy as np
from common import nmse
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from mlx_models import convert, reference, torch
from safetensors.numpy import load_file

LOCKSTEP = ROOT / "build" / "release" / "lockstep"
BOUNDS = [("f32", "f32", 1e-10), ("exact", "f32", 5e-8), ("exact", "f16", 1e-6)]


def accuracy(folder):
    """True if every mode is within its bound; for f16 the rows from the first routing flip on are left out."""
    ids = load_file(ROOT / "tests" / "data" / "smollm2" / "mixtral-logits.safetensors")["long.ids"]
    model, count = reference(folder)
    print(f"{count} quantised matrices; {len(ids)} tokens")
    with torch.no_grad():
        truth = model(torch.tensor([ids.tolist()]), use_cache=False).logits[0].numpy()
    good = True
    for precision, kv, bound in BOUNDS:
        out = folder.parent / "mlx-logits.safetensors"
        subprocess.run([LOCKSTEP, "logits", "-m", folder, "--ids", ",".join(map(str, ids)), "--precision", precision,
                        "--kv-type", kv, "-o", out], check=True, stderr=subprocess.DEVNULL)
        got = load_file(out)["logits"]
        rows = np.square(got - truth).sum(-1) / np.square(truth).sum(-1)
        within = nmse(got, truth) <= bound
        good = good and within
        print(f"{precision}, KV {kv}: NMSE {nmse(got, truth):.2g} (worst row {rows.max():.2g}), bound {bound:g}"
              f"{'' if within else '  NOT WITHIN'}")
    return good


def mlx_decode(folder, tokens):
    """Tokens per second of mlx-lm after a short prompt."""
    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 9690, 198]]), cache=cache))
    start = time.perf_counter()
    for token in range(tokens):
        mx.eval(model(mx.array([[100 + token]]), cache=cache))
    return tokens / (time.perf_counter() - start)


def lockstep_decode(folder):
    run = subprocess.run([LOCKSTEP, "bench", "-m", folder, "--prefill", "16", "--decode", "64", "--repeat", "1", "--json"],
                         check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(run.stdout)["decode_tps"]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--tokens", type=int, default=6, help="that mlx-lm decodes a round (about 1 a second)")
    options = p.parse_args()
    mx.set_default_device(mx.cpu)
    folder = ROOT / "build" / "models" / "mixtral-mlx-4bit"
    if not (folder / "config.json").exists():
        source = ROOT / "build" / "models" / "mixtral"
        if not source.exists():
            sys.exit(f"{source} is missing: run scripts/test")
        convert(source, folder, 4, 64)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).write_bytes((source / name).read_bytes())
    good = accuracy(folder)
    ours, theirs = [], []
    for _ in range(options.rounds):
        theirs.append(mlx_decode(folder, options.tokens))
        ours.append(lockstep_decode(folder))
    ratio = statistics.median(o / t for o, t in zip(ours, theirs))
    print(f"decode, tokens/s: lockstep {statistics.median(ours):.1f} ({min(ours):.1f} to {max(ours):.1f}), mlx-lm "
          f"{statistics.median(theirs):.2f} ({min(theirs):.2f} to {max(theirs):.2f}); median ratio {ratio:.0f}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

"""The noise floor of a model: how far variants of the reference are from it, site by site.

Truth is the reference in f64. Variants: f32, and f32 with every input of the model perturbed by half a unit in the last
place; for the declared policies also K and V rounded to f16, and the inputs of products, or attention, rounded as
rounding.py says. The distance is the relative L2 error of a row; the floor is the largest over rows, steps and variants.
All take the experts that the truth chose.
"""
import sys

import numpy as np
import torch

from .transformers_engine import in_f64, run

POLICIES = [(precision, kv) for precision in ("f32", "exact", "fast", "bf16", "q8") for kv in ("f32", "f16")] + [("fast", "i16")]


def collect(model, taps, prompt, fed, wanted):
    out = {}

    def sink(phase, step, position, layer, site, x):
        if wanted(layer, site):
            out[phase, step, layer, site] = np.array(x, np.float64)
    run(model, taps, prompt, fed, sink)
    return out


def distance(got, truth):
    """Relative L2 of each row; a row of zeros counts as one of the site's own size."""
    rows = lambda x: x.reshape(len(x), -1)
    size = np.linalg.norm(rows(truth), axis=1)
    usual = max(float(np.sqrt(np.mean(size ** 2))), 1e-300)
    return np.linalg.norm(rows(got) - rows(truth), axis=1) / np.maximum(size, 0.1 * usual)


def measure(model, taps, sequences, wanted=lambda layer, site: True):
    """sequences: [(prompt, fed)]. -> {policy: {"prefill"|"decode": {"L00.q_rope": floor}}}"""
    floors = {f"{precision}/{kv}": {"prefill": {}, "decode": {}} for precision, kv in POLICIES}
    passes = len(sequences) * (1 + 2 * len(POLICIES))
    done = 0

    def next_pass():
        nonlocal done
        done += 1
        print(f"\rnoise floor: pass {done} of {passes}", end="\n" if done == passes else "", file=sys.stderr, flush=True)
        return collect(model, taps, prompt, fed, wanted)

    for prompt, fed in sequences:
        taps.choices = {}    # made by the first run, the truth; the others take them, as ties may fall either way
        with in_f64(model):
            truth = next_pass()
        for taps.precision, taps.kv_type in POLICIES:
            variants = [next_pass()]
            with torch.no_grad():
                table = model.model.embed_tokens.weight
                kept = table.clone()
                noise = torch.Generator().manual_seed(1)
                table.mul_(1 + (torch.rand(table.shape, generator=noise) - 0.5) * 2 ** -23)
                variants.append(next_pass())
                table.copy_(kept)
            for got in variants:
                add(floors[f"{taps.precision}/{taps.kv_type}"], got, truth)
        taps.precision, taps.kv_type, taps.choices = "f32", "f32", None
    return floors


def add(floors, got, truth):
    for (phase, step, layer, site), value in truth.items():
        name = site if layer is None else f"L{layer:02d}.{site}"
        worst = float(distance(got[phase, step, layer, site], value).max())
        floors[phase][name] = max(floors[phase].get(name, 0.0), worst)

"""The noise floor of a model: how far variants of the reference are from it, site by site.

Truth is the reference in f64. Variants: f32, and f32 with every input of the model perturbed by half a unit in the last
place; for the declared policies also K and V rounded to f16, and the inputs of products rounded to 16-bit fixed point.
The distance is the relative L2 error of a row; the floor is the largest over rows, steps and variants.
"""
import numpy as np
import torch

from .transformers_engine import in_f64, run

POLICIES = {  # precision/kv_type: (rounded products, rounded K and V)
    "f32/f32": (False, False), "f32/f16": (False, True), "exact/f32": (True, False), "exact/f16": (True, True)}


def collect(model, taps, prompt, fed):
    out = {}
    run(model, taps, prompt, fed, lambda phase, step, pos, layer, site, x: out.__setitem__((phase, step, layer, site), np.asarray(x, np.float64)))
    return out


def distance(got, truth):
    """Relative L2 of each row; a row of zeros counts as one of the site's own size."""
    rows = lambda x: x.reshape(len(x), -1)
    size = np.linalg.norm(rows(truth), axis=1)
    usual = max(float(np.sqrt(np.mean(size ** 2))), 1e-300)
    return np.linalg.norm(rows(got) - rows(truth), axis=1) / np.maximum(size, 0.1 * usual)


def measure(model, taps, sequences):
    """sequences: [(prompt, fed)]. -> {policy: {"prefill"|"decode": {"L00.q_rope": floor}}}"""
    floors = {policy: {"prefill": {}, "decode": {}} for policy in POLICIES}
    for prompt, fed in sequences:
        with in_f64(model):
            truth = collect(model, taps, prompt, fed)
        for policy, (linear, kv) in POLICIES.items():
            taps.round_linear, taps.round_kv = linear, kv
            variants = [collect(model, taps, prompt, fed)]
            with torch.no_grad():
                table = model.model.embed_tokens.weight
                kept = table.clone()
                noise = torch.Generator().manual_seed(1)
                table.mul_(1 + (torch.rand(table.shape, generator=noise) - 0.5) * 2 ** -23)
                variants.append(collect(model, taps, prompt, fed))
                table.copy_(kept)
            taps.round_linear = taps.round_kv = False
            for got in variants:
                for (phase, step, layer, site), value in truth.items():
                    name = site if layer is None else f"L{layer:02d}.{site}"
                    if site == "router_weights" and ((got[phase, step, layer, site] > 0) != (value > 0)).any():
                        continue   # a tie, not an error of this size
                    worst = float(distance(got[phase, step, layer, site], value).max())
                    table_of = floors[policy][phase]
                    table_of[name] = max(table_of.get(name, 0.0), worst)
    return floors

"""How the policies round the inputs of products, by what a product is for and by how its weights are stored, and attention.

`exact` and `fast` are lockstep's own (src/nn/precision.h), and so are keys and values in `i16` (src/kernels/kernels.h);
`bf16` and `q8` are what other engines do, in every product.
"""
import math

import torch

ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
TAKES_8_BITS = ("q", "o", "gate", "up", "down")
ALTER_CHOICES = ("q", "o", "down")     # which take 16 in a mixture, or routers would choose other experts
BLOCKS = {"fixed16": (32, 32639), "fixed8": (16, 127), "q8": (32, 127)}    # columns of one scale, largest code


def input_form(precision, stored, role, mixture=False):
    """stored: integers, bf16 or float (f16 and f32); mixture: the layer has a router. -> the form of a product's inputs"""
    if precision in ("f32", "bf16", "q8"):
        return precision
    if precision not in ("exact", "fast"):
        raise ValueError(f"no rounding is known of {precision}")
    if stored == "integers":
        narrow = role in TAKES_8_BITS and not (mixture and role in ALTER_CHOICES)
        return "fixed8" if precision == "fast" and narrow else "fixed16"
    return "bf16" if precision == "fast" and stored == "bf16" and role != "router" else "f32"


def in_integers(x, largest):
    """Multiples of a scale for each row, of magnitude `largest` or less. x: [..., columns]"""
    scale = x.abs().amax(-1, keepdim=True) / largest
    return torch.where(scale > 0, torch.round(x / scale) * scale, x)


def rounded(x, form):
    """x: [..., columns]"""
    if form == "f32":
        return x
    if form == "bf16":
        return x.to(torch.bfloat16).to(x.dtype)
    columns, largest = BLOCKS[form]
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % columns))
    blocks = padded.reshape(*padded.shape[:-1], -1, columns)
    return in_integers(blocks, largest).reshape(padded.shape)[..., :x.shape[-1]]


LARGEST_VALUE, LARGEST_WEIGHT, TILE = 8191, 4096, 64    # TILE: keys whose weights share a scale


def largest_key(head_dim):
    """So large that products of a head add up in 32 bits."""
    return min(math.isqrt((2 ** 31 - 1) // head_dim), 2 ** 15 - 1)


def rounded_weights(probs, value, first):
    """Weights times the scales of their values in integers, with a scale for each tile, counted from position 0.
    probs: [B, H, T, K]; value: [B, H, K, D], of the positions from `first` on."""
    sizes = value.abs().amax(-1)[..., None, :]
    keys = probs.shape[-1]
    before, behind = first % TILE, -(first + keys) % TILE
    tiles = torch.nn.functional.pad(probs * sizes, (before, behind)).unflatten(-1, (-1, TILE))
    whole = in_integers(tiles, LARGEST_WEIGHT).flatten(-2)[..., before:before + keys]
    return torch.where(sizes > 0, whole / sizes, probs)

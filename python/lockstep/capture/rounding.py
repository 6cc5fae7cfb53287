"""How the policies round the inputs of products: by what a product is for and by how its weights are stored.

`exact` and `fast` are lockstep's own (src/nn/precision.h); `bf16` and `q8` are what other engines do, in every product.
"""
import torch

ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
TAKES_8_BITS = ("q", "o", "gate", "up", "down")
BEFORE_ROUTERS = ("q", "o")     # which take 16 where a router follows
BLOCKS = {"fixed16": (32, 32639), "fixed8": (16, 127), "q8": (32, 127)}    # columns of one scale, largest code


def input_form(precision, stored, role, mixture=False):
    """stored: integers, bf16 or float (f16 and f32); mixture: the layer has a router. -> the form of a product's inputs"""
    if precision in ("f32", "bf16", "q8"):
        return precision
    if precision not in ("exact", "fast"):
        raise ValueError(f"no rounding is known of {precision}")
    if stored == "integers":
        narrow = role in TAKES_8_BITS and not (mixture and role in BEFORE_ROUTERS)
        return "fixed8" if precision == "fast" and narrow else "fixed16"
    return "bf16" if precision == "fast" and stored == "bf16" and role != "router" else "f32"


def rounded(x, form):
    """x: [..., columns]"""
    if form == "f32":
        return x
    if form == "bf16":
        return x.to(torch.bfloat16).to(x.dtype)
    columns, largest = BLOCKS[form]
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % columns))
    blocks = padded.reshape(*padded.shape[:-1], -1, columns)
    scale = blocks.abs().amax(-1, keepdim=True) / largest
    codes = torch.where(scale > 0, torch.round(blocks / scale) * scale, blocks)
    return codes.reshape(padded.shape)[..., :x.shape[-1]]

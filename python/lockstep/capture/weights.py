"""Loading a model into transformers in f32 on its weights as stored: Hugging Face folders, GGUF files, MLX folders.

Quantised weights are dequantised first, so that quantisation is not mistaken for a fault.
"""
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ARGUMENTS = dict(dtype=torch.float32, attn_implementation="eager")


def load(path):
    """-> the model, in eval mode, its experts computed one by one"""
    path = Path(path)
    if path.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **ARGUMENTS)
    elif is_mlx(path):
        model = from_mlx(path)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, **ARGUMENTS)
    model.eval()
    if getattr(model.config, "num_local_experts", 0):
        model.set_experts_implementation("eager")
    return model


def files(path):
    path = Path(path)
    return [path] if path.suffix == ".gguf" else sorted(path.glob("model*.safetensors"))


def is_mlx(folder):
    config = Path(folder) / "config.json"
    return config.exists() and "quantization" in json.loads(config.read_text())


def from_mlx(folder):
    config = AutoConfig.from_pretrained(folder)
    for key in ("quantization", "quantization_config"):
        if hasattr(config, key):
            delattr(config, key)
    model = AutoModelForCausalLM.from_config(config, **ARGUMENTS)
    tensors, _ = dequantised(folder)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    return model


def dequantised(folder):
    """An MLX folder's weights by mx.dequantize, with scales and biases cast to f32 first (exact; in their own dtype mlx
    would round). -> {transformers name: f32}, how many matrices were quantised"""
    import mlx.core as mx
    mx.set_default_device(mx.cpu)
    q = json.loads((Path(folder) / "config.json").read_text()).get("quantization", {})
    stored = {}
    for file in files(folder):
        stored.update(mx.load(str(file)))
    out, count = {}, 0
    for name, x in stored.items():
        base, part = name.rsplit(".", 1)
        if part in ("scales", "biases"):
            continue
        if part == "weight" and base + ".scales" in stored:
            own = q.get(base) if isinstance(q.get(base), dict) else q
            s, b = (stored[f"{base}.{p}"].astype(mx.float32) for p in ("scales", "biases"))
            x = mx.dequantize(x, s, b, group_size=own["group_size"], bits=own["bits"])
            count += 1
        out[name] = np.array(x.astype(mx.float32))
    for name in [n for n in out if ".switch_mlp.gate_proj." in n]:
        layer = name.split(".block_sparse_moe.")[0]
        take = lambda p: out.pop(f"{layer}.block_sparse_moe.switch_mlp.{p}_proj.weight")
        out[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate([take("gate"), take("up")], 1)
        out[f"{layer}.mlp.experts.down_proj"] = take("down")
        out[f"{layer}.mlp.gate.weight"] = out.pop(f"{layer}.block_sparse_moe.gate.weight")
    out.setdefault("lm_head.weight", out["model.embed_tokens.weight"])
    return out, count

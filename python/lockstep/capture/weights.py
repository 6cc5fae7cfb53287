"""Loading a model into transformers in f32 on its weights as stored: Hugging Face folders, GGUF files, MLX folders.

Quantised weights are dequantised first, so that quantisation is not mistaken for a fault.
"""
import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

ARGUMENTS = dict(dtype=torch.float32, attn_implementation="eager")


def load(path):
    """-> the model, in eval mode, its experts computed one by one"""
    path = Path(path)
    if path.suffix == ".gguf":
        model = from_gguf(path)
    elif is_mlx(path):
        model = from_mlx(path)
    else:
        model = all_loaded(path, path, **ARGUMENTS)
    model.eval()
    if getattr(model.config, "num_local_experts", 0):
        model.set_experts_implementation("eager")
    return model


# What a product is for, by the names of its weights: of GGUF, of Hugging Face, and of their experts.
NAMES = {"q": ("attn_q", "self_attn.q_proj"), "k": ("attn_k", "self_attn.k_proj"), "v": ("attn_v", "self_attn.v_proj"),
         "o": ("attn_output", "self_attn.o_proj"), "router": ("ffn_gate_inp", "block_sparse_moe.gate", "mlp.gate"),
         "gate": ("ffn_gate", "mlp.gate_proj", "experts.w1", "experts.gate_up_proj"),
         "up": ("ffn_up", "mlp.up_proj", "experts.w3", "experts.gate_up_proj"),
         "down": ("ffn_down", "mlp.down_proj", "experts.w2", "experts.down_proj")}
COARSENESS = ("float", "bf16", "integers")


def formats(path):
    """How the weights of each product are stored. -> {(layer, role): integers, bf16 or float}, the head's layer None;
    experts stored differently count as the coarsest of them."""
    path, out, embedding = Path(path), {}, None
    for name, stored in (gguf_formats(path) if path.suffix == ".gguf" else folder_formats(path)).items():
        place = re.search(r"(?:blk|layers)\.(\d+)\.(.+)$", name)
        if place:    # without "weight", "_exps" and the numbers of experts
            matrix = re.sub(r"\.\d+(?=\.|$)|_exps$", "", place[2].removesuffix(".weight"))
            roles = [(int(place[1]), role) for role, names in NAMES.items() if any(matrix.endswith(n) for n in names)]
        else:
            roles = [(None, "head")] if name.removesuffix(".weight") in ("lm_head", "output") else []
        for key in roles:
            out[key] = max(out.get(key, "float"), stored, key=COARSENESS.index)
        if re.search(r"(token_embd|embed_tokens)\.weight$", name):
            embedding = stored
    if embedding is None:
        sys.exit(f"{path}: expected model*.safetensors or one .gguf file with the embeddings, found none")
    out.setdefault((None, "head"), embedding)
    return out


def gguf_formats(path):
    floats = {gguf.GGMLQuantizationType.F32: "float", gguf.GGMLQuantizationType.F16: "float", gguf.GGMLQuantizationType.BF16: "bf16"}
    return {t.name: floats.get(t.tensor_type, "integers") for t in gguf.GGUFReader(path).tensors}


def folder_formats(folder):
    """Of MLX too, whose quantised matrices have scales."""
    kinds = tensor_types(folder)
    stored = lambda name: "integers" if name.removesuffix("weight") + "scales" in kinds else "bf16" if kinds[name] == "BF16" else "float"
    return {name: stored(name) for name in kinds if not name.endswith((".scales", ".biases"))}


def tensor_types(folder):
    """-> {name: dtype as safetensors writes it}"""
    kinds = {}
    for file in files(folder):
        with safe_open(file, "np") as tensors:
            kinds |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    return kinds


def files(path):
    path = Path(path)
    return [path] if path.suffix == ".gguf" else sorted(path.glob("model*.safetensors"))


def from_gguf(path):
    """By transformers, but for experts under the name llama, which it would leave at random."""
    reader = gguf.GGUFReader(path)
    if "llama.expert_count" in reader.fields:
        return mixtral_from_gguf(path, reader)
    return all_loaded(path, path.parent, gguf_file=path.name, **ARGUMENTS)


def all_loaded(path, *where, **how):
    """transformers leaves weights that it does not find at random."""
    model, loading = AutoModelForCausalLM.from_pretrained(*where, output_loading_info=True, **how)
    missing = sorted(loading["missing_keys"])
    if missing:
        sys.exit(f"{path}: transformers finds no weights for {', '.join(missing[:3])}")
    return model


def mixtral_from_gguf(path, reader):
    fact = lambda key, usual=None: reader.fields[key].contents() if key in reader.fields else usual
    of = lambda key, usual=None: fact("llama." + key, usual)
    if of("rope.scaling.type", "none") != "none" or fact("split.count", 1) != 1:
        sys.exit(f"{path}: no way to capture a mixture of experts with scaled RoPE or in several files; use its Hugging Face folder")
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    heads, kv_heads = of("attention.head_count"), of("attention.head_count_kv")
    layers, experts, hidden = of("block_count"), of("expert_count"), of("embedding_length")
    config = MixtralConfig(
        vocab_size=len(stored["token_embd.weight"]), hidden_size=hidden, intermediate_size=of("feed_forward_length"),
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=of("attention.key_length", hidden // heads), rms_norm_eps=of("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=of("context_length"), num_local_experts=experts, num_experts_per_tok=of("expert_used_count"),
        sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": of("rope.freq_base", 10000.0)})

    def halves(x, heads):    # rows of neighbours, as RoPE of GGUF wants them, back to two halves
        return x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)

    def of_experts(layer, part):
        whole = stored.get(f"blk.{layer}.ffn_{part}_exps.weight")
        return whole if whole is not None else np.stack([stored[f"blk.{layer}.ffn_{part}.{e}.weight"] for e in range(experts)])

    out = {"model.embed_tokens.weight": stored["token_embd.weight"], "model.norm.weight": stored["output_norm.weight"],
           "lm_head.weight": stored.get("output.weight", stored["token_embd.weight"])}
    for n in range(layers):
        own = lambda name: stored[f"blk.{n}.{name}.weight"]
        out |= {f"model.layers.{n}.{name}": x for name, x in {
            "input_layernorm.weight": own("attn_norm"), "post_attention_layernorm.weight": own("ffn_norm"),
            "self_attn.q_proj.weight": halves(own("attn_q"), heads), "self_attn.k_proj.weight": halves(own("attn_k"), kv_heads),
            "self_attn.v_proj.weight": own("attn_v"), "self_attn.o_proj.weight": own("attn_output"),
            "mlp.gate.weight": own("ffn_gate_inp"), "mlp.experts.down_proj": of_experts(n, "down"),
            "mlp.experts.gate_up_proj": np.concatenate([of_experts(n, "gate"), of_experts(n, "up")], 1)}.items()}
    model = AutoModelForCausalLM.from_config(config, **ARGUMENTS)
    model.load_state_dict({k: torch.from_numpy(np.array(v, np.float32)) for k, v in out.items()})
    return model


def is_mlx(folder):
    """MLX's own names of experts, or its quantisation."""
    config = Path(folder) / "config.json"
    quantised = config.exists() and "quantization" in json.loads(config.read_text())
    return quantised or any(".switch_mlp." in name for name in tensor_types(folder))


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

"""Taps for transformers: module hooks, and patches where hooks see nothing (rotation, attention, residuals).

Everything runs in one process on the CPU, one sequence at a time, in f32 on the weights as stored (GGUF files are
dequantised first). The attention is this file's own plain one, so that its inner tensors exist and so that an f64 run
really is one: transformers casts softmax and norms to f32.
"""
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .trace import checksums

SUPPORTED = ("llama", "mistral", "mixtral", "qwen2")
ATTENTION = "lockstep_plain"


class Taps:
    """Hands every site's tensor to `sink(layer, site, [T, ...] tensor)`."""

    def __init__(self, model):
        self.model, self.sink, self.layer = model, None, None
        self.round_kv = self.round_linear = False
        config = model.config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        body = model.model
        self.after(body.embed_tokens, "embed", outside=True)
        for index, layer in enumerate(body.layers):
            layer.register_forward_pre_hook(lambda *_, i=index: setattr(self, "layer", i))
            attention, mlp = layer.self_attn, layer.mlp
            self.after(layer.input_layernorm, "attn_norm")
            for name in ("q_proj", "k_proj", "v_proj"):
                self.after(getattr(attention, name), name, heads=True)
            self.before(attention.o_proj, "attn_ctx", heads=True)
            self.after(attention.o_proj, "o_proj")
            self.before(layer.post_attention_layernorm, "attn_resid")
            self.after(layer.post_attention_layernorm, "ffn_norm")
            if hasattr(mlp, "experts"):
                mlp.gate.register_forward_hook(self.router)
                self.after(mlp, "moe_out")
            else:
                self.after(mlp.gate_proj, "gate")
                self.after(mlp.up_proj, "up")
                self.before(mlp.down_proj, "act")
                self.after(mlp.down_proj, "down")
            self.after(layer, "ffn_resid")
        self.after(body.norm, "final_norm", outside=True)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(self.round_input)
        self.patch_rotation(sys.modules[type(model).__module__])

    def emit(self, site, x, layer):
        if self.sink is not None:
            self.sink(layer, site, x.detach()[0] if x.dim() >= 3 else x.detach())

    def before(self, module, site, heads=False):
        module.register_forward_pre_hook(lambda _, args: self.emit(site, self.split(args[0], heads), self.layer))

    def after(self, module, site, heads=False, outside=False):
        def hook(_, args, out):
            out = out[0] if isinstance(out, tuple) else out
            self.emit(site, self.split(out, heads), None if outside else self.layer)
        module.register_forward_hook(hook)

    def split(self, x, heads):
        return x.reshape(*x.shape[:-1], -1, self.head_dim) if heads else x

    def router(self, _, args, out):
        logits, scores, indices = out
        self.emit("router_logits", logits, self.layer)
        self.emit("router_weights", torch.zeros_like(logits).scatter(-1, indices, scores.to(logits.dtype)), self.layer)

    def patch_rotation(self, module):
        original = getattr(module.apply_rotary_pos_emb, "original", module.apply_rotary_pos_emb)

        def rotate(q, k, cos, sin, *args, **kwargs):
            q, k = original(q, k, cos.to(q.dtype), sin.to(q.dtype), *args, **kwargs)
            self.emit("q_rope", q.transpose(1, 2), self.layer)
            self.emit("k_rope", k.transpose(1, 2), self.layer)
            return q, k

        rotate.original = original
        module.apply_rotary_pos_emb = rotate

    def round_input(self, _, args):
        """16-bit fixed point per block of 32, as lockstep's `exact` rounds what integer weights are multiplied with."""
        if not self.round_linear:
            return None
        x = args[0]
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32))
        blocks = padded.reshape(*padded.shape[:-1], -1, 32)
        scale = blocks.abs().amax(-1, keepdim=True) / 32639
        rounded = torch.where(scale > 0, torch.round(blocks / scale) * scale, blocks)
        return (rounded.reshape(padded.shape)[..., :x.shape[-1]], *args[1:])


def plain_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Eager attention in the dtype it is given. -> [B, L, H, D], None"""
    taps = module.lockstep_taps
    if taps.round_kv:
        key, value = (x.to(torch.float16).to(x.dtype) for x in (key, value))
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., :key.shape[-2]].to(scores.dtype)
    return (torch.softmax(scores, -1) @ value).transpose(1, 2).contiguous(), None


@contextmanager
def in_f64(model):
    """The model in f64, its norms too; back to f32 afterwards."""
    norms = {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}
    originals = {kind: kind.forward for kind in norms}

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    torch.nn.Module.double(model)    # transformers refuses it for a file that was quantised, which it is no longer
    for kind in norms:
        kind.forward = norm
    try:
        yield
    finally:
        for kind, forward in originals.items():
            kind.forward = forward
        torch.nn.Module.float(model)


def load(path):
    path = Path(path)
    arguments = dict(dtype=torch.float32, attn_implementation="eager")
    if path.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **arguments)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, **arguments)
    if model.config.model_type not in SUPPORTED:
        sys.exit(f"{path}: no taps for {model.config.model_type}; there are some for {', '.join(SUPPORTED)}")
    model.eval()
    if getattr(model.config, "num_local_experts", 0):
        model.set_experts_implementation("eager")
    return prepare(model)


def prepare(model):
    """Puts the taps and the plain attention into a model; masks stay those of eager attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, plain_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)
    model.config._attn_implementation = ATTENTION
    taps = Taps(model)
    for layer in model.model.layers:
        layer.self_attn.lockstep_taps = taps
    return model, taps


def run(model, taps, prompt, steps, sink):
    """Prefill and decode of one sequence. `steps`: the tokens fed after it, or a number of greedy ones. -> those fed.
    sink(phase, step, first position, layer, site, f64 or f32 array)."""
    cache, fed = DynamicCache(config=model.config), []
    wanted = len(steps) if not isinstance(steps, int) else steps
    ids, position = list(prompt), 0
    for step in range(wanted + 1):
        phase = "decode" if step else "prefill"
        taps.sink = lambda layer, site, x: sink(phase, step, position, layer, site, x.numpy())
        with torch.no_grad():
            logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0]
        sink(phase, step, position, None, "logits", logits.numpy())
        position += len(ids)
        if step < wanted:
            ids = [int(logits[-1].argmax()) if isinstance(steps, int) else int(steps[step])]
            fed += ids
    taps.sink = None
    return fed


def facts(path, model):
    files = [Path(path)] if Path(path).suffix == ".gguf" else sorted(Path(path).glob("*.safetensors"))
    return {"engine": {"name": "transformers", "version": transformers.__version__, "torch": torch.__version__,
                       "threads": torch.get_num_threads()},
            "policy": {"precision": "f32", "kv_type": "f32"},
            "model": {"architecture": model.config.model_type, "layers": model.config.num_hidden_layers,
                      "config": {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"},
                      "weights_sha256": checksums(files)}}

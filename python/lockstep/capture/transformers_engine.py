"""Taps for transformers: module hooks, and patches where hooks see nothing (rotation, attention, experts).

Everything runs in one process on the CPU, one sequence at a time, in f32 on the weights as stored. The attention and the
loop over experts are this file's own plain ones, so that their inner tensors exist and so that an f64 run really is one:
transformers casts softmax and norms to f32.
"""
import sys
from contextlib import contextmanager

import torch
import transformers
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import rounding, weights
from .trace import checksums

SUPPORTED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
NORMS_HEADS_FIRST = ("gemma3_text",)   # q_norm and k_norm see [B, H, T, D], not [B, T, H, D]
ATTENTION = "lockstep_plain"


class Taps:
    """Hands every site's tensor to `sink(layer, site, [T, ...] tensor)`. formats: of `weights.formats`."""

    def __init__(self, model, formats):
        self.model, self.formats, self.sink, self.layer = model, formats, None, None
        self.precision, self.kv_type, self.fault = "f32", "f32", None
        self.choices = None            # of experts, to be taken instead of the router's: {(first position, layer): [T, k]}
        self.first = 0                 # position of the first row of this pass
        config = model.config
        self.vocab = config.vocab_size
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        body = model.model
        for index, layer in enumerate(body.layers):
            layer.register_forward_pre_hook(lambda *_, i=index: setattr(self, "layer", i))
            attention, mlp = layer.self_attn, layer.mlp
            if index == 0:
                self.before(layer.input_layernorm, "embed", outside=True)
            self.after(layer.input_layernorm, "attn_norm")
            for name in ("q_proj", "k_proj", "v_proj"):
                self.after(getattr(attention, name), name, heads=True)
            for name in ("q_norm", "k_norm"):
                if hasattr(attention, name):
                    self.after(getattr(attention, name), name, transposed=config.model_type in NORMS_HEADS_FIRST)
            self.before(attention.o_proj, "attn_ctx", heads=True)
            self.after(attention.o_proj, "o_proj")
            if hasattr(layer, "pre_feedforward_layernorm"):     # Gemma 2 and 3: norms after each half too
                self.after(layer.post_attention_layernorm, "attn_post_norm")
                self.after(layer.post_feedforward_layernorm, "ffn_post_norm")
                ffn_norm = layer.pre_feedforward_layernorm
            else:
                ffn_norm = layer.post_attention_layernorm
            self.before(ffn_norm, "attn_resid")
            self.after(ffn_norm, "ffn_norm")
            for module in (attention, mlp):
                for name, linear in module.named_children():
                    if name in rounding.ROLES:
                        self.round_input(linear, index, rounding.ROLES[name])
            if hasattr(mlp, "experts"):
                self.round_input(mlp.gate, index, "router")
                mlp.gate.register_forward_hook(self.router)
                mlp.experts.forward = lambda *args, experts=mlp.experts: plain_experts(self, experts, *args)
                self.after(mlp, "moe_out")
            else:
                self.after(mlp.gate_proj, "gate")
                self.after(mlp.up_proj, "up")
                self.before(mlp.down_proj, "act")
                self.after(mlp.down_proj, "down")
            self.after(layer, "ffn_resid")
            attention.lockstep_taps = self
        self.after(body.norm, "final_norm", outside=True)
        self.round_input(model.lm_head, None, "head")
        self.patch_rotation(sys.modules[type(model).__module__])

    def emit(self, site, x, layer):
        if self.sink is not None:
            self.sink(layer, site, x.detach())

    def before(self, module, site, **how):
        module.register_forward_pre_hook(lambda _, args: self.emit_rows(site, args[0], **how))

    def after(self, module, site, **how):
        def hook(_, args, out):
            self.emit_rows(site, out[0] if isinstance(out, tuple) else out, **how)
        module.register_forward_hook(hook)

    def emit_rows(self, site, x, heads=False, outside=False, transposed=False):
        """x: [B, T, ...]; heads: C is split into [H, D]; transposed: [B, H, T, D]"""
        x = (x.transpose(1, 2) if transposed else x)[0]
        self.emit(site, x.reshape(len(x), -1, self.head_dim) if heads else x, None if outside else self.layer)

    def router(self, _, args, out):
        logits, scores, indices = out
        if self.choices is not None:
            indices = self.choices.setdefault((self.first, self.layer), indices)
            scores = torch.softmax(logits.gather(-1, indices), -1)
        self.emit("router_logits", logits, self.layer)
        self.emit("router_weights", torch.zeros_like(logits).scatter(-1, indices, scores.to(logits.dtype)), self.layer)
        return logits, scores, indices

    def patch_rotation(self, module):
        original = getattr(module.apply_rotary_pos_emb, "original", module.apply_rotary_pos_emb)

        def rotate(q, k, cos, sin, *args, **kwargs):
            before = (q, k)
            q, k = original(q, k, cos.to(q.dtype), sin.to(q.dtype), *args, **kwargs)
            if self.fault == "rope-head-0" and q.shape[2] == 1:
                q, k = (torch.cat([new[:, :1], old[:, 1:]], 1) for new, old in zip((q, k), before))
            self.emit_rows("q_rope", q, transposed=True)
            self.emit_rows("k_rope", k, transposed=True)
            return q, k

        rotate.original = original
        module.apply_rotary_pos_emb = rotate

    def round_input(self, module, layer, role):
        module.register_forward_pre_hook(lambda _, args: (self.rounded(args[0], layer, role), *args[1:]))

    def rounded(self, x, layer, role):
        """The input of a product as the policy rounds it."""
        mixture = (layer, "router") in self.formats
        return rounding.rounded(x, rounding.input_form(self.precision, self.formats[layer, role], role, mixture))


def plain_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **_):
    """Eager attention in the dtype it is given. query: [B, H, T, D], key, value: [B, Hkv, K, D], the newest last.
    -> [B, T, H, D], None"""
    taps = module.lockstep_taps
    if taps.kv_type == "f16":
        key, value = (x.to(torch.float16).to(x.dtype) for x in (key, value))
    if taps.kv_type == "i16":
        largest = rounding.largest_key(key.shape[-1])
        query, key = (rounding.in_integers(x, largest) for x in (query, key))
        value = rounding.in_integers(value, rounding.LARGEST_VALUE)
    rows, keys = query.shape[2], key.shape[2]
    for site, x in (("k_cache", key), ("v_cache", value)):
        taps.emit_rows(site, x[:, :, keys - rows:], transposed=True)
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    shown = scores
    if attention_mask is not None:
        mask = attention_mask[..., :keys].to(scores.dtype)
        shown = scores.masked_fill(mask < -1e30, 0)
        scores = scores + mask
    probs = torch.softmax(scores, -1)
    forgotten = taps.first + rows - keys    # positions before those that the cache still holds
    for site, x in (("scores", shown), ("probs", probs)):
        taps.emit_rows(site, torch.nn.functional.pad(x, (forgotten, 0)), transposed=True)
    if taps.kv_type == "i16":
        probs = rounding.rounded_weights(probs, value, forgotten)
    return (probs @ value).transpose(1, 2).contiguous(), None


def plain_experts(taps, experts, x, chosen, weight):
    """The sum over chosen experts, expert by expert. x: [T, hidden]; chosen, weight: [T, k] -> [T, hidden]"""
    width = experts.down_proj.shape[-1]
    shown = {site: x.new_zeros(len(x), experts.num_experts, size)
             for site, size in (("gate", width), ("up", width), ("act", width), ("down", x.shape[-1]))}
    out = torch.zeros_like(x)
    for e in range(experts.num_experts):
        rows, place = torch.where(chosen == e)
        if len(rows) == 0:
            continue
        gate, up = (torch.nn.functional.linear(taps.rounded(x[rows], taps.layer, role), weight)
                    for role, weight in zip(("gate", "up"), experts.gate_up_proj[e].chunk(2)))
        act = experts.act_fn(gate) * up
        down = torch.nn.functional.linear(taps.rounded(act, taps.layer, "down"), experts.down_proj[e])
        for site, value in (("gate", gate), ("up", up), ("act", act), ("down", down)):
            shown[site][rows, e] = value
        out.index_add_(0, rows, down * weight[rows, place, None].to(down.dtype))
    for site, value in shown.items():
        taps.emit("expert_" + site, value, taps.layer)
    return out


@contextmanager
def in_f64(model):
    """The model in f64, its norms too; back to f32 afterwards."""
    norms = {type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")}
    originals = {kind: kind.forward for kind in norms}

    def norm(self, x):
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        weight = self.weight + 1 if type(self).__name__.startswith("Gemma") else self.weight
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

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
    model = weights.load(path)
    if model.config.model_type not in SUPPORTED:
        sys.exit(f"{path}: no taps for {model.config.model_type}; there are some for {', '.join(SUPPORTED)}")
    return prepare(model, weights.formats(path))


def prepare(model, formats):
    """Puts the taps and the plain attention into a model; masks stay those of eager attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, plain_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)
    model.config._attn_implementation = ATTENTION
    return model, Taps(model, formats)


def run(model, taps, prompt, steps, sink):
    """Prefill and decode of one sequence. `steps`: the tokens fed after it, or a number of greedy ones. -> those fed.
    sink(phase, step, first position, layer, site, f64 or f32 array)."""
    cache, fed = DynamicCache(config=model.config), []
    wanted = len(steps) if not isinstance(steps, int) else steps
    ids, taps.first = list(prompt), 0
    for step in range(wanted + 1):
        phase = "decode" if step else "prefill"
        taps.sink = lambda layer, site, x: sink(phase, step, taps.first, layer, site, x.numpy())
        with torch.no_grad():
            logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0]
        sink(phase, step, taps.first, None, "logits", logits.numpy())
        taps.first += len(ids)
        if step < wanted:
            ids = [int(logits[-1].argmax()) if isinstance(steps, int) else int(steps[step])]
            fed += ids
    taps.sink = None
    return fed


def facts(path, model, taps):
    engine = {"name": "transformers", "version": transformers.__version__, "torch": torch.__version__,
              "threads": torch.get_num_threads()}
    if taps.fault:
        engine["fault"] = taps.fault
    return {"engine": engine, "policy": {"precision": "f32", "kv_type": "f32"},
            "model": {"architecture": model.config.model_type, "layers": model.config.num_hidden_layers,
                      "config": {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"},
                      "weights_sha256": checksums(weights.files(path))}}

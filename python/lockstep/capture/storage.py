"""What a trace keeps of each row: all, a sample of its columns, or a sketch of it (docs/trace-format.md)."""
import numpy as np



def splitmix64(x):
    """SplitMix64 (Steele, Lea and Flood 2014), elementwise on uint64."""
    with np.errstate(over="ignore"):
        z = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class Storage:
    def __init__(self, kind, count=0, seed=0):
        self.kind, self.count, self.seed = kind, count, seed

    def whole(self, width, axes):
        return self.kind == "full" or width <= self.count or axes in ("T E", "T H K")

    def manifest(self):
        return {"kind": "full"} if self.kind == "full" else {"kind": self.kind, "count": self.count, "seed": self.seed}

    def reduce(self, values):
        """values: [..., width] -> [..., count]"""
        width = values.shape[-1]
        with np.errstate(over="ignore"):
            base = splitmix64(self.seed)
            if self.kind == "sample":
                keys = splitmix64(base + np.arange(width, dtype=np.uint64))
                return np.ascontiguousarray(values[..., np.sort(np.argsort(keys, kind="stable")[:self.count])])
            word = np.arange(self.count, dtype=np.uint64) // np.uint64(64)
            bit = np.arange(self.count, dtype=np.uint64) % np.uint64(64)
            column = np.arange(width, dtype=np.uint64)[:, None] * np.uint64(1048576)
            words = splitmix64(base + column + word[None] + np.uint64(1))
        signs = np.where((words >> bit) & np.uint64(1), 1.0, -1.0)   # [width, count]
        return (values.astype(np.float64) @ signs / np.sqrt(self.count)).astype(np.float32)


FULL = Storage("full")


def parse(text, seed):
    """"full", "sample:64" or "sketch:64"; ValueError otherwise."""
    kind, _, count = text.partition(":")
    if text == "full":
        return FULL
    if kind not in ("sample", "sketch") or not count.isdigit() or not 8 <= int(count) <= 1048576:
        raise ValueError(f"expected full, sample:N or sketch:N, N from 8 to 1048576; got {text}")
    return Storage(kind, int(count), seed)

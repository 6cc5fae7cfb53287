#!/usr/bin/env python3
"""The twin of rope_multihead.cpp on mlx: the same input, the same lines.

    pip install 'mlx[cpu]' numpy
    diff <(build/examples/rope_multihead) <(python examples/rope_multihead.py)

"same" is exact in lockstep; mlx may round another way for another shape, so here it is to 6 digits.
"""
import sys

import mlx.core as mx
import numpy as np

HEADS, WIDTH = 4, 8
FACTORS = np.array([1, -1, 10, -10], np.float32)  # head h = factor * head 0


def rope(x):
    return np.array(mx.fast.rope(mx.array(x), WIDTH, traditional=False, base=10000.0, scale=1.0, offset=10))


def heads(batch, length):
    """[batch, heads, length, width], every row of a head alike."""
    head = np.arange(1, WIDTH + 1, dtype=np.float32) / np.float32(10)
    return np.tile((FACTORS[:, None] * head)[None, :, None], (batch, 1, length, 1))


def report(y, first_position, table):
    same = np.allclose(first_position, table, rtol=1e-6, atol=0)
    print(f"{list(y.shape)}: {'same' if same else 'different'}")
    return same


table = rope(heads(1, 1))
print(f"head  first three values of {list(table.shape)} after RoPE")
for h, row in enumerate(table[0, :, 0]):
    print(f"{h:4d}  {row[0]:.6g} {row[1]:.6g} {row[2]:.6g}")
collapsed = rope(heads(1, 1).reshape(HEADS, 1, WIDTH))
batch = rope(heads(2, 3))
good = report(collapsed, collapsed[:, 0], table[0, :, 0])
good = report(batch, batch[:, :, 0], table[:, :, 0]) and good
sys.exit(0 if good else 1)

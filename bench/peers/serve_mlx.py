"""mlx-lm on the CPU on an MLX folder, for serve.py. Its number of threads is its own affair."""
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from serve import serve, timed


def load(path, threads, settings):
    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(path))

    def measure(prefill, decode):
        cache, state = make_prompt_cache(model), {}

        def forward(ids):
            state["next"] = mx.argmax(model(mx.array([ids]), cache=cache)[0, -1]).item()

        return timed(forward, lambda: forward([state["next"]]), [(7 * i * i + 3 * i) % 40000 for i in range(prefill)], decode)

    return measure


serve(load)

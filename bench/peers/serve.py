"""The worker's side of workers.py: load a model once, then answer a line of JSON with a line of JSON.

    PYTHON serve_ENGINE.py MODEL --threads N [--set KEY=VALUE]...
    {"prefill": 512, "decode": 1}   ->   {"prefill_tps": 900.1, "decode_tps": 40.2, "peak_mb": 1800.5}
"""
import argparse
import json
import resource
import sys
import time


def serve(load):
    """load(path, threads, settings) -> measure(prefill, decode) -> (prefill tokens/s, decode tokens/s)"""
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("--threads", type=int, required=True)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = p.parse_args()
    say = lambda value: print(json.dumps(value), flush=True)
    try:
        measure = load(options.model, options.threads, dict(pair.split("=", 1) for pair in options.set))
        say({"ready": True})
        for line in sys.stdin:
            asked = json.loads(line)
            prefill, decode = measure(asked["prefill"], asked["decode"])
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
            say({"prefill_tps": prefill, "decode_tps": decode, "peak_mb": peak})
    except Exception as error:    # the other side puts it into the table
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})


def timed(prefill, step, prompt, decode):
    """Speeds of an engine that is called a pass at a time: prefill(ids) and step(), both waiting until it is done."""
    start = time.perf_counter()
    prefill(prompt)
    between = time.perf_counter()
    for _ in range(decode):
        step()
    return len(prompt) / (between - start), decode / (time.perf_counter() - between)

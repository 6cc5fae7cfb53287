"""What bench/compare measures: each task with the models it is measured on."""
from peers.base import Task

WITHOUT_FAST = ("lockstep", "llama.cpp", "OpenVINO GenAI", "transformers", "mlx-lm")
ALL = ("lockstep", "lockstep fast", *WITHOUT_FAST[1:])
GGUF = tuple(f"{shape}-{kind}" for shape in ("0.5b", "1b", "mixtral") for kind in ("q4_0", "q4_k_m", "q8_0", "bf16"))
WHOLE = ("smollm2", *GGUF, "1b-mlx4", "mixtral-mlx4")
LARGE = tuple(f"{shape}-{kind}" for shape in ("1b", "mixtral") for kind in ("q4_0", "q4_k_m"))
PAIR = ("1b-q4_0", "mixtral-q4_0")

TASKS = {task.name: task for task in (
    Task("decode", "Decode, one stream", "decode", WHOLE, decode=64, engines=WITHOUT_FAST),
    Task("decode-1t", "Decode, one stream, one thread", "decode", LARGE, decode=48, threads=1, engines=WITHOUT_FAST),
    Task("prefill", "Prefill of {prefill:,} tokens", "prefill", WHOLE, prefill=512, engines=ALL),
    Task("streams-8", "Decode, 8 streams at once, each behind {depth:,} tokens", "streams", PAIR, depth=128, decode=32, streams=8, engines=ALL),
    Task("streams-32", "Decode, 32 streams at once, each behind {depth:,} tokens", "streams", PAIR, depth=128, decode=16, streams=32, engines=ALL),
    Task("decode-16k", "Decode behind {depth:,} tokens", "decode", ("1b-q4_0",), depth=16384, decode=32, engines=WITHOUT_FAST),
    Task("busy", "Decode beside a process that spins", "decode", PAIR, decode=48, busy=True, engines=WITHOUT_FAST),
    Task("busy-1t", "Decode beside a process that spins, one thread", "decode", PAIR, decode=48, busy=True, threads=1,
         engines=WITHOUT_FAST),
    Task("cold", "Cold start: to the first byte of the first token, 8-token prompt", "cold", ("smollm2", "1b-q4_0"),
         engines=WITHOUT_FAST),
    Task("memory", "Most resident memory, 300 tokens and 32 new ones", "memory", WHOLE, engines=WITHOUT_FAST),
)}

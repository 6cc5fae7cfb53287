"""OpenVINO GenAI on a GGUF file, for serve.py; speeds as its own PerfMetrics give them."""
import numpy as np
import openvino as ov
import openvino_genai as genai
from serve import serve


def load(path, threads, settings):
    pipeline = genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads, ATTENTION_BACKEND=settings.get("attention", "PA"),
                                 INFERENCE_PRECISION_HINT=settings.get("precision", "bf16"))
    random = np.random.default_rng(0)    # other ids each time: it would find the same prefix in its cache

    def measure(prefill, decode):
        config = genai.GenerationConfig(max_new_tokens=decode + 1, ignore_eos=True, do_sample=False, apply_chat_template=False)
        ids = random.integers(100, 40000, (1, prefill))
        got = pipeline.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config).perf_metrics
        return prefill / got.get_ttft().mean * 1e3, 1e3 / got.get_tpot().mean

    return measure


serve(load)

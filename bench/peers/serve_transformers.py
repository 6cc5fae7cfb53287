"""transformers in bf16 on a Hugging Face folder, for serve.py."""
import torch
from serve import serve, timed
from transformers import AutoModelForCausalLM, DynamicCache


def load(path, threads, settings):
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    if "experts" in settings:
        model.set_experts_implementation(settings["experts"])

    def measure(prefill, decode):
        state = {"cache": DynamicCache(config=model.config)}

        def forward(ids):
            with torch.inference_mode():
                out = model(torch.tensor([ids]), past_key_values=state["cache"], use_cache=True, logits_to_keep=1)
            state["next"] = int(out.logits[0, -1].argmax())

        return timed(forward, lambda: forward([state["next"]]), [(7 * i * i + 3 * i) % 40000 for i in range(prefill)], decode)

    return measure


serve(load)

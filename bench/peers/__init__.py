"""The engines that bench/compare measures, by the names of its tables."""
from .llama_cpp import LlamaCpp
from .lockstep import Lockstep
from .workers import MlxLm, OpenVino, Transformers


def engines(binary):
    every = (Lockstep(binary), Lockstep(binary, "fast"), LlamaCpp(), OpenVino(), Transformers(), MlxLm())
    return {engine.name: engine for engine in every}

"""Flax NNX modules: the Memory Caching mixer and the language model around it."""

from mc_jax.nn.language_model import LanguageModel
from mc_jax.nn.mixer import MemoryCaching

__all__ = ["LanguageModel", "MemoryCaching"]

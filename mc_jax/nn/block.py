"""A pre-norm block: a mixer over tokens and a SwiGLU MLP (MATH.md section 5)."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mc_jax import caching
from mc_jax.config import ModelConfig
from mc_jax.nn.mixer import Dtype, MemoryCaching, MixerCache
from mc_jax.nn.norm import RMSNorm


class SwiGLU(nnx.Module):
    """x -> (silu(x W_gate) * x W_in) W_out."""

    def __init__(self, model_dim: int, hidden: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.gate = nnx.Linear(model_dim, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.input = nnx.Linear(model_dim, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.output = nnx.Linear(hidden, model_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., D] to [..., D]."""
        return self.output(nnx.silu(self.gate(x)) * self.input(x))


class Block(nnx.Module):
    """x -> x + mixer(norm(x)), then x -> x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, dtype: Dtype, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(config.model_dim)
        self.mixer = MemoryCaching(
            config.model_dim,
            num_heads=config.num_heads,
            settings=caching.Settings(
                memory=config.memory,
                aggregation=config.aggregation,
                segment_length=config.segment_length,
                segment_init=config.segment_init,
                chunk_length=config.chunk_length,
            ),
            router_keys=config.router_keys,
            online_logit=config.online_logit,
            convolution_width=config.convolution_width,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(config.model_dim)
        self.mlp = SwiGLU(config.model_dim, config.mlp_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, document_ids: jax.Array | None) -> tuple[jax.Array, Any]:
        """Map x [B, T, D]; also the gates of the mixer's read, or None."""
        return self._around(x, lambda y: self.mixer.apply(y, document_ids))

    def prefill(self, x: jax.Array, lengths: jax.Array, capacity: int) -> tuple[jax.Array, MixerCache]:
        """As a call on rows of `lengths` [B], and the cache to go on with."""
        return self._around(x, lambda y: self.mixer.prefill(y, lengths, capacity))

    def step(self, x: jax.Array, cache: MixerCache) -> tuple[jax.Array, MixerCache]:
        """One more token a row, x [B, D]."""
        return self._around(x, lambda y: self.mixer.step(y, cache))

    def _around(self, x: jax.Array, mix: Callable[[jax.Array], tuple[jax.Array, Any]]):
        mixed, kept = mix(self.mixer_norm(x))
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), kept

"""A pre-norm block: a mixer over tokens and a SwiGLU MLP (docs/math.md section 5)."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from mc_jax import caching
from mc_jax.config import LayerKind, ModelConfig
from mc_jax.nn.attention import Attention
from mc_jax.nn.mixer import Dtype, MemoryCaching
from mc_jax.nn.norm import RMSNorm
from pallas_kernels._platform import on_tpu


class SwiGLU(nnx.Module):
    """x -> (silu(x W_gate) * x W_in) W_out."""

    def __init__(self, model_dim: int, hidden: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.gate = nnx.Linear(model_dim, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.input = nnx.Linear(model_dim, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.output = nnx.Linear(hidden, model_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., D] to [..., D]."""
        gate, inputs = _with_gradient_by_rows(self.gate(x)), _with_gradient_by_rows(self.input(x))
        return self.output(nnx.silu(gate) * inputs)


class Block(nnx.Module):
    """x -> x + mixer(norm(x)), then x -> x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, kind: LayerKind, *, dtype: Dtype, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(config.model_dim)
        self.mixer = _mixer(config, kind, dtype, rngs)
        self.mlp_norm = RMSNorm(config.model_dim)
        self.mlp = SwiGLU(config.model_dim, config.mlp_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, document_ids: jax.Array | None, top_k: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """Map x [B, T, D]; also the gates of the mixer's read, or None."""
        return self._around(x, lambda y: self.mixer.apply(y, document_ids, top_k))

    def prefill(
        self, x: jax.Array, lengths: jax.Array, max_length: int, storage: caching.Storage
    ) -> tuple[jax.Array, Any]:
        """What a call gives on rows of `lengths` [B], and the cache to go on with up to `max_length`.

        The storage is that of memories; attention keeps all keys and values.
        """
        mixer = self.mixer
        if isinstance(mixer, MemoryCaching):
            return self._around(x, lambda y: mixer.prefill(y, lengths, max_length, storage))
        return self._around(x, lambda y: mixer.prefill(y, lengths, max_length))

    def begin(self, batch: int, max_length: int, storage: caching.Storage) -> Any:
        """The cache before the first token of `batch` rows, for `extend` up to `max_length` tokens a row."""
        if isinstance(self.mixer, MemoryCaching):
            return self.mixer.begin(batch, max_length, storage)
        return self.mixer.begin(batch, max_length)

    def extend(self, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """What a call gives on tokens x [B, T, D] that go on from a cache, and the next one."""
        return self._around(x, lambda y: self.mixer.extend(y, cache))

    def step(self, x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """One more token a row, x [B, D]."""
        return self._around(x, lambda y: self.mixer.step(y, cache))

    def _around(self, x: jax.Array, mix: Callable[[jax.Array], tuple[jax.Array, Any]]):
        mixed, kept = mix(self.mixer_norm(x))
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), kept


@jax.custom_vjp
def _with_gradient_by_rows(x: jax.Array) -> jax.Array:
    """X itself, whose gradient a TPU's memory holds with features side by side.

    Left alone, the compiler for a v6e lays it out the other way round, and copies gate and input, which are
    kept as they were made, to match: a quarter of the MLP's cycles.
    """
    return x


def _by_rows(bar: jax.Array) -> jax.Array:
    return with_layout_constraint(bar, Layout(tuple(range(bar.ndim)))) if on_tpu(bar) else bar


_with_gradient_by_rows.defvjp(lambda x: (x, None), lambda _, bar: (_by_rows(bar),))


def _mixer(config: ModelConfig, kind: LayerKind, dtype: Dtype, rngs: nnx.Rngs) -> MemoryCaching | Attention:
    if kind != "memory":
        window = config.attention_window if kind == "window" else None
        return Attention(config.model_dim, num_heads=config.num_heads, window=window, dtype=dtype, rngs=rngs)
    return MemoryCaching(
        config.model_dim,
        num_heads=config.num_heads,
        settings=caching.Settings(
            memory=config.memory,
            aggregation=config.aggregation,
            segment_length=config.segment_length,
            segmentation=config.segmentation,
            segment_init=config.segment_init,
            chunk_length=config.chunk_length,
            top_k=config.top_k,
            router_blocks=config.router_blocks,
            branch=config.memory_branch,
        ),
        mlp=config.memory_depth == 2,
        router_keys=config.router_keys,
        router_dim=config.router_dim,
        online_logit=config.online_logit,
        cache_scale=config.cache_scale,
        convolution_width=config.convolution_width,
        dtype=dtype,
        rngs=rngs,
    )

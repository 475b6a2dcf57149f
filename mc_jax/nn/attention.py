"""Causal softmax attention with rotary positions: the Transformer++ baseline, and hybrids.

Shapes: B batch, T tokens, D model dim, H heads, K head dim, C places of the cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.nn.mixer import Dtype
from mc_jax.parallel import constrain
from mc_jax.parallel.attention import attend
from pallas_kernels._kept import keep

_ROTARY_BASE = 10_000.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """Keys and values of the tokens so far; those past a row's length are empty places."""

    k: jax.Array
    """[B, C, H, K], rotated."""
    v: jax.Array
    """[B, C, H, K]."""
    length: jax.Array
    """[B], int32."""


class Attention(nnx.Module):
    """Global, or sliding-window, attention [B, T, D] -> [B, T, D].

    Where devices share a row, each gathers the keys and values of all its tokens: unlike a memory, attention
    moves every one of them. On a TPU each gathers the queries too, and attends for all tokens.
    """

    def __init__(self, model_dim: int, *, num_heads: int, window: int | None, dtype: Dtype, rngs: nnx.Rngs):
        """Draw the weights; `window` counts the tokens seen, a token's own included; None: all."""

        def linear() -> nnx.Linear:
            return nnx.Linear(model_dim, model_dim, use_bias=False, dtype=dtype, rngs=rngs)

        self.num_heads = num_heads
        self.window = window
        self.query, self.key, self.value, self.output = linear(), linear(), linear(), linear()

    def apply(
        self, x: jax.Array, document_ids: jax.Array | None = None, top_k: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        """Mix tokens x [B, T, D]; packed documents [B, T] do not see each other. There are no gates."""
        q, k, v = self._rotated(x)
        q = constrain(q, "batch", "tokens", "heads")
        k, v = (constrain(part, "batch", None, "heads") for part in (k, v))
        return self._attend(x, q, k, v, document_ids), None

    def prefill(self, x: jax.Array, lengths: jax.Array, max_length: int) -> tuple[jax.Array, AttentionCache]:
        """What `apply` gives, and the cache to go on with, up to `max_length` tokens a row."""
        q, k, v = self._rotated(x)
        more = [(0, 0), (0, max(0, max_length - x.shape[1])), (0, 0), (0, 0)]
        cache = AttentionCache(jnp.pad(k, more), jnp.pad(v, more), lengths)
        return self._attend(x, q, k, v, None), cache

    def begin(self, batch: int, max_length: int) -> AttentionCache:
        """The cache before the first token of `batch` rows, for `extend` up to `max_length` tokens a row."""
        width = self.query.kernel.shape[0]
        empty = jnp.zeros((batch, max_length, self.num_heads, width // self.num_heads), self.query.dtype)
        return AttentionCache(empty, jnp.copy(empty), jnp.zeros((batch,), jnp.int32))

    def extend(self, x: jax.Array, cache: AttentionCache) -> tuple[jax.Array, AttentionCache]:
        """Mix tokens x [B, T, D] that go on from a cache; NaN in rows that ran out of places."""
        position = cache.length[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        q, k, v = self._rotated(x, position)
        rows = jnp.arange(x.shape[0])[:, None]
        keys, values = cache.k.at[rows, position].set(k), cache.v.at[rows, position].set(v)
        places = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, None]
        seen = places <= position[..., None]
        if self.window is not None:
            seen &= places > (position - self.window)[..., None]
        y = jax.nn.dot_product_attention(q, keys, values, mask=seen[:, None]).reshape(x.shape)
        y = jnp.where((position < keys.shape[1])[..., None], y, jnp.nan)
        return self.output(y), AttentionCache(keys, values, cache.length + x.shape[1])

    def step(self, x: jax.Array, cache: AttentionCache) -> tuple[jax.Array, AttentionCache]:
        """One more token a row, x [B, D]; NaN in rows that ran out of places."""
        q, k, v = (_part[:, 0] for _part in self._rotated(x[:, None], cache.length[:, None]))
        rows = jnp.arange(x.shape[0])
        keys, values = cache.k.at[rows, cache.length].set(k), cache.v.at[rows, cache.length].set(v)
        places = jnp.arange(keys.shape[1], dtype=jnp.int32)[None]
        seen, visible = places <= cache.length[:, None], values
        if self.window is not None:
            seen &= places > (cache.length - self.window)[:, None]
            # What is past need not be finite: 0 times NaN is NaN.
            visible = jnp.where(seen[..., None, None], values, 0)
        y = jax.nn.dot_product_attention(q[:, None], keys, visible, mask=seen[:, None, None])
        y = jnp.where((cache.length < keys.shape[1])[:, None], y.reshape(x.shape), jnp.nan)
        return self.output(y), AttentionCache(keys, values, cache.length + 1)

    def _rotated(self, x: jax.Array, positions: jax.Array | None = None):
        q, k, v = (
            part(x).reshape(*x.shape[:2], self.num_heads, -1) for part in (self.query, self.key, self.value)
        )
        if positions is None:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        return _rotate(q, positions), _rotate(k, positions), v

    def _attend(self, x, q, k, v, document_ids) -> jax.Array:
        return self.output(keep(attend(q, k, v, document_ids, self.window)).reshape(x.shape))


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Turn pairs of x [B, T, H, K] by angles that grow with positions [B or 1, T] (arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    frequencies = _ROTARY_BASE ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = (positions.astype(jnp.float32)[..., None] * frequencies[None, None])[:, :, None]
    first, second = jnp.split(x[..., : 2 * half].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [
            first * jnp.cos(angles) - second * jnp.sin(angles),
            first * jnp.sin(angles) + second * jnp.cos(angles),
        ],
        axis=-1,
    )
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)

"""A short causal convolution over tokens, channel by channel.

Shapes: B batch, T tokens, D channels, W width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mc_jax.parallel.halo import with_tokens_before


class ShortConvolution(nnx.Module):
    """y_t = sum_j kernel[j] * x_{t-j}, over the token's own document."""

    def __init__(self, channels: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        bound = width**-0.5
        kernel = jax.random.uniform(rngs.params(), (width, channels), minval=-bound, maxval=bound)
        self.taps = nnx.Param(kernel)
        self.dtype = dtype

    def __call__(self, x: jax.Array, document_ids: jax.Array | None = None) -> jax.Array:
        """Convolve x [B, T, D]; document_ids [B, T] or None."""
        taps = self.taps[...].astype(self.dtype)
        return with_tokens_before(_convolve, taps.shape[0] - 1, (x, document_ids), taps)

    def tail(self, x: jax.Array, lengths: jax.Array, document_ids: jax.Array | None = None) -> jax.Array:
        """The last W - 1 inputs of each row [B, W - 1, D], oldest first, zeros before its document."""
        positions = lengths[:, None] - jnp.arange(self.taps.shape[0] - 1, 0, -1, dtype=jnp.int32)[None]
        inside = jnp.maximum(positions, 0)
        valid = positions >= 0
        if document_ids is not None:
            last = jnp.take_along_axis(document_ids, lengths[:, None] - 1, axis=1)
            valid &= jnp.take_along_axis(document_ids, inside, axis=1) == last
        rows = jnp.take_along_axis(x, inside[..., None], axis=1)
        return jnp.where(valid[..., None], rows, jnp.zeros((), x.dtype))

    def step(self, x: jax.Array, tail: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One token x [B, D] after `tail` [B, W - 1, D]: its output and the new tail."""
        window = jnp.concatenate([tail, x[:, None]], axis=1)
        taps = self.taps[...].astype(self.dtype)
        return jnp.einsum("bwd,wd->bd", window, taps[::-1]), window[:, 1:]


def _convolve(tokens: tuple[jax.Array, jax.Array | None], taps: jax.Array) -> jax.Array:
    """Sum taps [W, D] times x [B, T, D] and earlier tokens of the document in [B, T]."""
    x, document_ids = tokens
    y = taps[0][None, None] * x
    for distance in range(1, min(taps.shape[0], x.shape[1])):
        shifted = jnp.pad(x, ((0, 0), (distance, 0), (0, 0)))[:, : x.shape[1]]
        if document_ids is not None:
            same = document_ids[:, distance:] == document_ids[:, :-distance]
            same = jnp.pad(same, ((0, 0), (distance, 0)))
            shifted = jnp.where(same[..., None], shifted, jnp.zeros((), x.dtype))
        y = y + taps[distance][None, None] * shifted
    return y

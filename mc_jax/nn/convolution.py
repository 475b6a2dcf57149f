"""A short causal convolution over tokens, channel by channel, and SiLU.

Shapes: B batch, T tokens, D channels, W width, H heads, K channels of a head.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mc_jax.parallel.convolution import convolve


class ShortConvolution(nnx.Module):
    """y_t = silu(sum_j taps[j] * x_{t-j}), over the token's own document."""

    def __init__(self, channels: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        bound = width**-0.5
        kernel = jax.random.uniform(rngs.params(), (width, channels), minval=-bound, maxval=bound)
        self.taps = nnx.Param(kernel)
        self.dtype = dtype

    def __call__(
        self,
        x: jax.Array,
        document_ids: jax.Array | None = None,
        *,
        heads: int = 1,
        normalize: bool = False,
        first: int = 0,
    ) -> jax.Array:
        """Convolve x [B, T, D], which are the module's channels from `first` on: [B, T, H, K].

        `document_ids` are [B, T], or None; `normalize` scales each head to length 1.
        """
        taps = self.taps[...][:, first : first + x.shape[2]]
        return convolve(
            x.astype(self.dtype), taps, heads=heads, normalize=normalize, document_ids=document_ids
        )

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
        """One token x [B, D] after `tail` [B, W - 1, D]: its output [B, D] and the new tail."""
        window = jnp.concatenate([tail, x[:, None]], axis=1)
        taps = self.taps[...].astype(self.dtype)
        return nnx.silu(jnp.einsum("bwd,wd->bd", window, taps[::-1])), window[:, 1:]

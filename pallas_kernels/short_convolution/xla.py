"""The convolution as sums of shifted rows, for every platform."""

import jax
import jax.numpy as jnp

from pallas_kernels._state import state_dtype


def short_convolution(
    x: jax.Array, taps: jax.Array, *, heads: int, normalize: bool, document_ids: jax.Array | None
) -> jax.Array:
    """See `pallas_kernels.short_convolution.short_convolution`; shapes as there."""
    s = jax.nn.silu(convolve(x, taps.astype(x.dtype), document_ids))
    s = s.reshape(*s.shape[:-1], heads, -1)
    return unit_length(s) if normalize else s


def convolve(x: jax.Array, taps: jax.Array, document_ids: jax.Array | None) -> jax.Array:
    """Sum taps [W, D] times x [B, T, D] and earlier tokens of the document in [B, T]."""
    y = taps[0][None, None] * x
    for distance in range(1, min(taps.shape[0], x.shape[1])):
        shifted = jnp.pad(x, ((0, 0), (distance, 0), (0, 0)))[:, : x.shape[1]]
        if document_ids is not None:
            same = document_ids[:, distance:] == document_ids[:, :-distance]
            same = jnp.pad(same, ((0, 0), (distance, 0)))
            shifted = jnp.where(same[..., None], shifted, jnp.zeros((), x.dtype))
        y = y + taps[distance][None, None] * shifted
    return y


def unit_length(x: jax.Array) -> jax.Array:
    """Return x / sqrt(|x|^2 + 1e-6) along the last axis, in x's dtype: a finite gradient at 0."""
    wide = x.astype(state_dtype(x))
    square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + 1e-6)).astype(x.dtype)

"""RMS normalisation, computed in float32, or float64 if the activations are."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels._state import state_dtype


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale along the last axis."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [..., dim]; the result has its dtype."""
        wide = x.astype(state_dtype(x))
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
        scale = self.scale[...].astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * inverse * scale).astype(x.dtype)

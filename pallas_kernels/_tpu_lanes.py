"""Tokens along lanes, and matrix products in kernels that have them there.

Shapes: B batch, T tokens, H heads, K key dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._state import state_dtype

# A bfloat16 register has 16 sublanes: dims are padded to that.
SUBLANES = 16


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b, accumulated in the state's dtype."""
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=state_dtype(a))


def product_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a^T b, accumulated in the state's dtype."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=state_dtype(a))


def product_of_lanes(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b^T, accumulated in the state's dtype."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=state_dtype(a))


def lanes(x_BTHK: jax.Array, tokens: int) -> jax.Array:
    """Lay queries out with tokens along lanes: [B, H, K, `tokens`], padded with zeros."""
    _, length, _, dim = x_BTHK.shape
    more = ((0, 0), (0, tokens - length), (0, 0), (0, -dim % SUBLANES))
    return jnp.pad(x_BTHK, more).transpose(0, 2, 3, 1)


def from_lanes(x_BHKT: jax.Array, tokens: int, dim: int) -> jax.Array:
    """Undo `lanes`."""
    return x_BHKT.transpose(0, 3, 1, 2)[:, :tokens, :, :dim]

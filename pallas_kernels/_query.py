"""What a memory answers to a query, shared by the ops that read cached memories.

K key dim, V value dim, E hidden dim.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._branch import Branch
from pallas_kernels._state import Weights, state_dtype

gelu = functools.partial(jax.nn.gelu, approximate=True)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b with operands of a's dtype, summed and returned in float32 (float64 if that is a's)."""
    return jnp.matmul(a, b.astype(a.dtype), preferred_element_type=state_dtype(a))


def query(q: jax.Array, weights: Weights, branch: Branch | None = None) -> jax.Array:
    """Return q M, or an MLP's `branch` at q, [..., V] for q [..., K]; float32 at least."""
    if isinstance(weights, tuple):
        assert branch is not None
        w_in, w_out = weights
        return branch.of(matmul(gelu(matmul(q, w_in)).astype(q.dtype), w_out))
    return matmul(q, weights)

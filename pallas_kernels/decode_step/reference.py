"""The token as its definition has it: what every other implementation must agree with.

B batch, H heads, K key dim, V value dim, N slots, J states that a head selects.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._state import OnlineState, state_dtype
from pallas_kernels._step import memory_step


def decode_step(
    state: OnlineState,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    states: jax.Array,
    gates: jax.Array,
    indices: jax.Array,
    *,
    online_gate: jax.Array,
    slot: jax.Array,
    **write: Any,
) -> tuple[jax.Array, OnlineState, jax.Array]:
    """See `pallas_kernels.decode_step.decode_step`; shapes as there."""
    dtype = state_dtype(q)
    batch, heads, _ = q.shape
    wide_q = q.astype(dtype)
    read, after = memory_step(state, wide_q, k, v, **write)
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    chosen = states[row, indices, head].astype(dtype)  # [B, H, J, K, V]
    chosen = jnp.where(gates[..., None, None] != 0, chosen, 0)
    y = online_gate[..., None].astype(dtype) * read
    y = y + jnp.einsum("bhk,bhj,bhjkv->bhv", wide_q, gates.astype(dtype), chosen, precision="highest")
    assert isinstance(after.weights, jax.Array)
    taken = (slot[:, None] == jnp.arange(states.shape[1], dtype=slot.dtype)[None])[..., None, None, None]
    states = jnp.where(taken, after.weights[:, None].astype(states.dtype), states)
    return y.astype(q.dtype), after, states

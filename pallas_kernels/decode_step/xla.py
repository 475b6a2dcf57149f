"""The token by a gather of what it reads and a scatter of what it leaves.

B batch, H heads, K key dim, V value dim, N slots, J states that a head selects.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._query import query
from pallas_kernels._state import OnlineState
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
    read, after = memory_step(state, q, k, v, **write)
    batch, heads, _ = q.shape
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    chosen_BHJKV = states.at[row, indices, head].get(mode="promise_in_bounds")
    reads_BHJV = query(q[:, :, None, None], chosen_BHJKV)[..., 0, :]
    y = online_gate[..., None].astype(reads_BHJV.dtype) * read.astype(reads_BHJV.dtype)
    gates_BHJ1 = gates[..., None].astype(reads_BHJV.dtype)
    y = y + jnp.sum(jnp.where(gates_BHJ1 != 0, gates_BHJ1 * reads_BHJV, 0), axis=2)
    # A scatter outside of the array writes nothing.
    place = jnp.where(slot < 0, states.shape[1], slot)
    assert isinstance(after.weights, jax.Array)
    new = after.weights.astype(states.dtype)
    states = states.at[jnp.arange(batch), place].set(new, mode="drop", unique_indices=True)
    return y.astype(q.dtype), after, states

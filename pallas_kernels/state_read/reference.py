"""The dense read as its definition has it: what every other implementation must agree with."""

import jax
import jax.numpy as jnp

from pallas_kernels._branch import Branch
from pallas_kernels._state import Weights, state_dtype


def gated_state_read(
    q: jax.Array, gates: jax.Array, states: Weights, *, branch: Branch | None, segment_length: int | None
) -> jax.Array:
    """See `pallas_kernels.state_read.gated_state_read`; shapes as there."""
    del segment_length  # only says which gates are 0
    dtype = state_dtype(q)
    wide_q, gates, states = jax.tree.map(lambda x: x.astype(dtype), (q, gates, states))
    if isinstance(states, tuple):
        w_in, w_out = states
        hidden = jax.nn.gelu(jnp.einsum("bthk,bnhke->bthne", wide_q, w_in), approximate=True)
        assert branch is not None
        read = branch.of(jnp.einsum("bthne,bnhev->bthnv", hidden, w_out))
        out = jnp.einsum("bthn,bthnv->bthv", gates, read)
    else:
        out = jnp.einsum("bthk,bthn,bnhkv->bthv", wide_q, gates, states)
    return out.astype(q.dtype)

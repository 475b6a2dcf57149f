"""The sparse read as its definition has it: what every other implementation must agree with.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, E hidden dim, N states, k states a token reads.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._branch import Branch
from pallas_kernels._state import Weights, state_dtype


def routed_state_read(
    q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights, *, branch: Branch | None
) -> jax.Array:
    """See `pallas_kernels.routed_read.routed_state_read`; shapes as there."""
    dtype = state_dtype(q)
    wide_q, gates = q.astype(dtype), gates.astype(dtype)
    batch, _, heads, _ = q.shape
    row = jnp.arange(batch)[:, None, None, None]
    head = jnp.arange(heads)[None, None, :, None]
    chosen = jax.tree.map(lambda leaf: leaf.astype(dtype)[row, indices, head], states)  # [B, T, H, k, ...]
    if isinstance(chosen, tuple):
        w_in, w_out = chosen
        hidden = jax.nn.gelu(jnp.einsum("bthk,bthjke->bthje", wide_q, w_in), approximate=True)
        assert branch is not None
        read = branch.of(jnp.einsum("bthje,bthjev->bthjv", hidden, w_out))
        out = jnp.einsum("bthj,bthjv->bthv", gates, read)
    else:
        out = jnp.einsum("bthk,bthj,bthjkv->bthv", wide_q, gates, chosen)
    return out.astype(q.dtype)

"""The sparse read by matrix products over the tokens that share a state.

Backwards everything is made again but the inputs, through the same grouping.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, E hidden dim, N states, k states a token reads,
R rows: see `_grouping`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels._query import gelu, query
from pallas_kernels._state import Weights, state_dtype
from pallas_kernels.routed_read._grouping import Grouping, from_rows, group, group_in_blocks, to_rows

_BLOCK = 32

type Product = Callable[[jax.Array, jax.Array], jax.Array]
"""Rows [B, H, R, K] times the states [B, N, H, K, V] that they read."""


def routed_state_read(q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights) -> jax.Array:
    """See `pallas_kernels.routed_read.routed_state_read`; shapes as there."""
    if q.shape[1] == 1:
        return gather(q, gates, indices, states)

    @jax.checkpoint
    def read(*arguments):
        # Decided when the program is compiled, which may be for another platform than this one.
        return jax.lax.platform_dependent(*arguments, cpu=_in_blocks, default=_by_ragged_dot)

    return read(q, gates, indices, states)


def gather(q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights) -> jax.Array:
    """Copy every state that a token reads to the token: for one token a row, in decoding."""
    by_head = jax.vmap(lambda leaf, chosen: leaf[chosen], in_axes=(1, 1), out_axes=1)
    chosen = jax.tree.map(lambda leaf: jax.vmap(by_head)(leaf, indices), states)
    reads_BTHkV = query(q[:, :, :, None, None], chosen)[..., 0, :]
    return jnp.sum(gates[..., None].astype(reads_BTHkV.dtype) * reads_BTHkV, axis=3).astype(q.dtype)


@jax.checkpoint
def in_blocks(q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights) -> jax.Array:
    """Pad the tokens of each state to whole blocks; a block is one product of a batch, with a copied state.

    For the CPU, where `jax.lax.ragged_dot` multiplies all rows with all states.
    """
    return _in_blocks(q, gates, indices, states)


@jax.checkpoint
def by_ragged_dot(q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights) -> jax.Array:
    """Multiply the tokens of each state with it by `jax.lax.ragged_dot`: for TPU and GPU."""
    return _by_ragged_dot(q, gates, indices, states)


def _in_blocks(q, gates, indices, states):
    grouping, state_of_block = group_in_blocks(_pairs(indices), jax.tree.leaves(states)[0].shape[1], _BLOCK)
    by_head = jax.vmap(lambda leaf, chosen: leaf[chosen], in_axes=(1, 0))

    def product(rows, leaf):
        batch, heads, count, dim = rows.shape
        blocks = rows.reshape(batch, heads, -1, _BLOCK, dim)
        return query(blocks, jax.vmap(by_head)(leaf, state_of_block)).reshape(batch, heads, count, -1)

    return _read(q, gates, states, grouping, product)


def _by_ragged_dot(q, gates, indices, states):
    grouping, count = group(_pairs(indices), jax.tree.leaves(states)[0].shape[1])

    def product(rows, leaf):
        batch, heads, _, dim = rows.shape
        out = jax.lax.ragged_dot(
            rows.reshape(-1, dim),
            leaf.swapaxes(1, 2).reshape(-1, *leaf.shape[3:]).astype(rows.dtype),
            count.reshape(-1),
            preferred_element_type=state_dtype(rows),
        )
        return out.reshape(batch, heads, -1, leaf.shape[-1])

    return _read(q, gates, states, grouping, product)


def _read(q, gates, states, grouping: Grouping, product: Product):
    choices = gates.shape[3]
    hidden = to_rows(choices, q.swapaxes(1, 2), grouping)
    gate = to_rows(1, _pairs(gates)[..., None], grouping)
    gate = jnp.where(grouping.filled[..., None], gate, jnp.zeros((), gate.dtype))
    if isinstance(states, tuple):
        w_in, states = states
        hidden = gelu(product(hidden, w_in))
    # Weighed before the last product: backwards the gate's gradient then needs no read again.
    weighed = gate.astype(state_dtype(q)) * hidden.astype(state_dtype(q))
    rows = product(weighed.astype(q.dtype), states)
    return from_rows(choices, rows, grouping).swapaxes(1, 2).astype(q.dtype)


def _pairs(x):
    """[B, T, H, k] -> [B, H, T k]."""
    batch, tokens, heads, choices = x.shape
    return x.swapaxes(1, 2).reshape(batch, heads, tokens * choices)

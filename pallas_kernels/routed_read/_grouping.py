"""Bringing the tokens that read one state together, and their reads back: a sort, and gathers both ways.

A pair is one (token, choice), numbered token * k + choice. Every pair has a row, those of a state side by
side, with empty rows where a state's pairs have to fill whole blocks.

Shapes: B batch, T tokens, H heads, N states, k choices, P = T k pairs, R rows, D any dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Grouping(NamedTuple):
    """Where pairs lie."""

    pair: jax.Array
    """The pair in each row [B, H, R]; in an empty row any pair."""
    row: jax.Array
    """The row of each pair [B, H, P]."""
    filled: jax.Array
    """Whether there is a pair in a row [B, H, R]."""


def group(indices: jax.Array, states: int) -> tuple[Grouping, jax.Array]:
    """Lay pairs out without empty rows.

    Args:
      indices: the state that each pair reads [B, H, P].
      states: how many states there are.

    Returns:
      The grouping, R = P, and how many pairs each state has [B, H, N].
    """
    order, row, start = _by_head(functools.partial(_sort, states=states))(indices)
    return Grouping(order, row, jnp.ones(order.shape, bool)), jnp.diff(start, axis=-1)


def group_in_blocks(indices: jax.Array, states: int, block: int) -> tuple[Grouping, jax.Array]:
    """Lay pairs out in blocks of `block` rows, all rows of a block for one state.

    Args:
      indices: the state that each pair reads [B, H, P].
      states: how many states there are.
      block: rows of a block.

    Returns:
      The grouping, R a multiple of `block`, and the state of each block [B, H, R / block].
    """
    return _by_head(functools.partial(_group_head_in_blocks, states=states, block=block))(indices)


def _by_head(function):
    return jax.vmap(jax.vmap(function))


def _sort(indices, states):
    """The pairs by state, the place of each pair among them, and where each state starts, with the end."""
    order = jnp.argsort(indices)
    start = jnp.searchsorted(indices[order], jnp.arange(states + 1, dtype=indices.dtype))
    return tuple(x.astype(jnp.int32) for x in (order, jnp.argsort(order), start))


def _group_head_in_blocks(indices, states, block):
    pairs = indices.shape[0]
    order, place, start = _sort(indices, states)
    count = jnp.diff(start)
    blocks = -(-count // block)
    end = jnp.cumsum(blocks, dtype=jnp.int32)
    first = end - blocks
    # No more blocks than this, whatever the choice: one a state may be part empty.
    most = (pairs + min(states, pairs) * (block - 1)) // block
    number = jnp.arange(most, dtype=jnp.int32)
    state = jnp.minimum(jnp.searchsorted(end, number, side="right"), states - 1)
    within = ((number - first[state]) * block)[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
    filled = (within < count[state][:, None]).reshape(-1)
    pair = order[jnp.minimum(start[state][:, None] + within, pairs - 1).reshape(-1)]
    row = first[indices] * block + place - start[indices]
    return Grouping(pair, row, filled), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def to_rows(choices: int, x: jax.Array, grouping: Grouping) -> jax.Array:
    """Copy what belongs to tokens to the rows of their pairs: [B, H, P / choices, D] to [B, H, R, D].

    An empty row gets something that means nothing and gives it no gradient. `choices` is k, or 1 where x has
    an entry for every pair.
    """
    return _take(x, grouping.pair // choices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def from_rows(choices: int, rows: jax.Array, grouping: Grouping) -> jax.Array:
    """Sum over each token's pairs what their rows have: [B, H, R, D] to [B, H, P / choices, D].

    An empty row's gradient means nothing: weigh it with 0.
    """
    pairs = _take(rows, grouping.row)
    batch, heads, count, dim = pairs.shape
    return jnp.sum(pairs.reshape(batch, heads, count // choices, choices, dim), axis=3)


# Each is the other's transpose but for the empty rows, so that gradients need no scatter either.
to_rows.defvjp(
    lambda choices, x, grouping: (to_rows(choices, x, grouping), grouping),
    lambda choices, grouping, bar: (from_rows(choices, bar, grouping), None),
)
from_rows.defvjp(
    lambda choices, rows, grouping: (from_rows(choices, rows, grouping), grouping),
    lambda choices, grouping, bar: (to_rows(choices, bar, grouping), None),
)


def _take(x, indices):
    # Without the barrier the CPU works the indices out again for each of a row's numbers.
    indices = jax.lax.optimization_barrier(indices)
    take = functools.partial(_take_of_head)
    return _by_head(take)(x, indices)


def _take_of_head(x, indices):
    return x.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)

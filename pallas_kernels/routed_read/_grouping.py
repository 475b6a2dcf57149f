"""Bringing the tokens that read one state together, and their reads back: a sort, and gathers both ways.

A pair is one (token, choice), numbered token * k + choice. Every pair has a row, those of a state side by
side, with empty rows where a state's pairs have to fill whole blocks.

Shapes: T tokens, N states, k choices, P = T k pairs, R rows, D any dim, G lists of pairs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Grouping(NamedTuple):
    """The place of every (token, choice) pair among those sorted by state."""

    pair: jax.Array
    """The pair in each row [R]; in an empty row any pair."""
    row: jax.Array
    """The row of each pair [P]."""
    filled: jax.Array
    """Whether there is a pair in a row [R]."""


def group(indices: jax.Array, states: int) -> tuple[Grouping, jax.Array]:
    """Lay the pairs of several lists out one list after the other, without empty rows.

    Args:
      indices: the state that each pair reads [G, P], int32, of its own list's states.
      states: how many states each list has.

    Returns:
      The grouping of all G P pairs, and how many pairs each state has [G, N].
    """
    lists, pairs = indices.shape
    order, place, start = jax.vmap(functools.partial(_sort, states=states))(indices)
    offset = pairs * jnp.arange(lists, dtype=jnp.int32)[:, None]
    pair, row = (order + offset).reshape(-1), (place + offset).reshape(-1)
    return Grouping(pair, row, jnp.ones(pair.shape, bool)), jnp.diff(start, axis=1)


def group_in_blocks(indices: jax.Array, states: int, block: int) -> tuple[Grouping, jax.Array]:
    """Lay pairs out in blocks of rows, all rows of a block for one state.

    Args:
      indices: the state that each pair reads [P], int32.
      states: how many states there are.
      block: rows of a block.

    Returns:
      The grouping, R a multiple of `block`, and the state of each block [R / block].
    """
    pairs = indices.shape[0]
    order, place, start = _sort(indices, states)
    count = jnp.diff(start)
    blocks = -(-count // block)
    end = jnp.cumsum(blocks, dtype=jnp.int32)
    first = end - blocks
    # However the pairs are spread, there are no more blocks than this: a state has at most one short one.
    most = (pairs + min(states, pairs) * (block - 1)) // block
    number = jnp.arange(most, dtype=jnp.int32)
    state = jnp.minimum(jnp.searchsorted(end, number, side="right"), states - 1)
    within = ((number - first[state]) * block)[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
    filled = (within < count[state][:, None]).reshape(-1)
    pair = order[jnp.minimum(start[state][:, None] + within, pairs - 1).reshape(-1)]
    row = first[indices] * block + place - start[indices]
    return Grouping(pair, row, filled), state


def _sort(indices, states):
    """The pairs by state, the place of each pair among them, and where each state starts, with the end."""
    order = jnp.argsort(indices)
    start = jnp.searchsorted(indices[order], jnp.arange(states + 1, dtype=indices.dtype))
    return tuple(x.astype(jnp.int32) for x in (order, jnp.argsort(order), start))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def to_rows(choices: int, x: jax.Array, grouping: Grouping) -> jax.Array:
    """Copy what belongs to tokens to the rows of their pairs: [P / choices, D] to [R, D].

    An empty row gets something that means nothing and gives it no gradient. `choices` is k, or 1 where x has
    an entry for every pair.
    """
    return _take(x, grouping.pair // choices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def from_rows(choices: int, rows: jax.Array, grouping: Grouping) -> jax.Array:
    """Sum what the rows of each token's pairs have: [R, D] to [P / choices, D].

    An empty row's gradient means nothing: weigh the row with 0.
    """
    return jnp.sum(_take(rows, grouping.row).reshape(-1, choices, rows.shape[-1]), axis=1)


# But for the empty rows each is the other's transpose: gradients need no scatter either.
to_rows.defvjp(
    lambda choices, x, grouping: (to_rows(choices, x, grouping), grouping),
    lambda choices, grouping, bar: (from_rows(choices, bar, grouping), None),
)
from_rows.defvjp(
    lambda choices, rows, grouping: (from_rows(choices, rows, grouping), grouping),
    lambda choices, grouping, bar: (to_rows(choices, bar, grouping), None),
)


def _take(x, indices):
    return x.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)

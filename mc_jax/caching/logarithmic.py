"""Logarithmic segmentation: a token's n completed segments, grouped by the binary digits of n.

For n = 6 the groups are the first 4 segments and the next 2 (MC section 3.1, read per token and not once a
sequence, which would give a sequence of 2^j segments a single group). Each group is one memory.

Shapes: B batch, T tokens, H heads, S segments, J levels: digits of the largest n.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.caching.aggregations import Gates, Scores
from mc_jax.caching.aggregations._interface import softmax_gates


class Groups(NamedTuple):
    """The groups of each token, a level each; where a digit of n is 0 there is none."""

    exists: jax.Array
    """[B, T, J], bool."""
    start: jax.Array
    """First segment of the group [B, T, J], int32."""
    end: jax.Array
    """Last segment of the group [B, T, J], int32."""


def groups(eligible: jax.Array) -> Groups:
    """Group the eligible segments [B, T, S] of each token, which are neighbours, by their number's digits."""
    segments = eligible.shape[-1]
    levels = jnp.arange(max(1, segments.bit_length()), dtype=jnp.int32)[None, None]
    number = jnp.sum(eligible, axis=-1, dtype=jnp.int32)[..., None]
    first = jnp.argmax(eligible, axis=-1).astype(jnp.int32)[..., None]
    start = first + ((number >> (levels + 1)) << (levels + 1))
    exists = (number >> levels) & 1 == 1
    end = start + (1 << levels) - 1
    return Groups(exists, jnp.where(exists, start, 0), jnp.where(exists, end, 0))


def group_gates(scores: Scores, tokens: jax.Array, groups: Groups) -> Gates:
    """One softmax over a token's groups and the online memory; the cached gates are [B, T, H, J].

    A group's score is that of its mean router key, and so the mean of its segments' scores.

    Args:
      scores: of the segments.
      tokens: in each segment's mean [B, S], in the dtype of scores.
      groups: of each token.
    """

    def sums(values: jax.Array) -> jax.Array:
        """The sum of each group, from values [B, T or 1, H or 1, S]."""
        shape = (*scores.cached.shape[:3], 1)
        found = []
        # Of the 2^j segments from each one on: no segment of another document is in a group's sum.
        for level in range(groups.start.shape[-1]):
            start = jnp.broadcast_to(groups.start[:, :, None, level, None], shape)
            here = jnp.broadcast_to(values, (*shape[:3], values.shape[-1]))
            found.append(jnp.take_along_axis(here, start, axis=-1))
            values = values + _shifted(values, 1 << level)
        return jnp.concatenate(found, axis=-1)

    weights = tokens[:, None, None, :]
    mean = sums(scores.cached * weights) / sums(weights)
    return softmax_gates(Scores(mean, scores.online), groups.exists[:, :, None])


def checkpoint_gates(gates: Gates, groups: Groups, segments: int) -> Gates:
    """Gates on segments' states: a group's memory is the checkpoint at its end."""
    at_end = jax.nn.one_hot(groups.end, segments, dtype=gates.cached.dtype)  # [B, T, J, S]
    return Gates(gates.online, jnp.einsum("bthj,btjs->bths", gates.cached, at_end))


def merged_gates(gates: Gates, groups: Groups, log_retention: jax.Array, first: jax.Array | None) -> Gates:
    """Gates on segments' states where a group's memory is the linear memory run over all its tokens.

    M_group = sum_s (decay from s's end to the group's end) M_s. A decay sums the log retentions between the
    two: in a difference of running sums, all that was forgotten before would cost precision.

    Args:
      gates: of the groups.
      groups: of each token.
      log_retention: sum of a segment's log retentions [B, S, H].
      first: the first segment of each one's document [B, S], int32; None: the row's.
    """
    segments = log_retention.shape[1]
    position = jnp.arange(segments, dtype=jnp.int32)[None]
    place = (position if first is None else position - first)[:, None, None]  # in its document [B, 1, 1, S]
    # A document's segments in blocks of 2^j, as groups are: a block's sum, and that after a segment in it.
    block = log_retention.swapaxes(1, 2)[:, None]  # [B, 1, H, S]
    to_end = jnp.zeros_like(block)
    cached = jnp.zeros((*gates.cached.shape[:3], segments), gates.cached.dtype)
    for level in range(gates.cached.shape[-1]):
        start, end = groups.start[..., level, None], groups.end[..., level, None]  # [B, T, 1]
        inside = (position[None] >= start) & (position[None] <= end)  # [B, T, S]
        decay = jnp.where(inside[:, :, None], jnp.exp(to_end), 0)
        cached = cached + gates.cached[..., level, None] * decay
        is_first = (place >> level) & 1 == 0
        after, before = _shifted(block, 1 << level), _shifted(block, -(1 << level))
        to_end = to_end + jnp.where(is_first, after, 0)
        block = block + jnp.where(is_first, after, before)
    return Gates(gates.online, cached)


def _shifted(x: jax.Array, distance: int) -> jax.Array:
    """What stands `distance` places later in the last axis; 0 past its end."""
    size = x.shape[-1]
    away = min(abs(distance), size)
    outside = jnp.zeros((*x.shape[:-1], away), x.dtype)
    if distance > 0:
        return jnp.concatenate([x[..., away:], outside], axis=-1)
    return jnp.concatenate([outside, x[..., : size - away]], axis=-1)

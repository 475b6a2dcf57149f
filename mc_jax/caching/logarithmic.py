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
        """Of each group, from values [B, T or 1, H or 1, S]."""
        before = jnp.pad(jnp.cumsum(values, axis=-1), ((0, 0), (0, 0), (0, 0), (1, 0)))
        shape = (*scores.cached.shape[:3], before.shape[-1])
        before = jnp.broadcast_to(before, shape)
        stop, start = (
            jnp.broadcast_to(index[:, :, None], (*shape[:3], index.shape[-1]))
            for index in (groups.end + 1, groups.start)
        )
        return jnp.take_along_axis(before, stop, axis=-1) - jnp.take_along_axis(before, start, axis=-1)

    weights = tokens[:, None, None, :]
    mean = sums(scores.cached * weights) / sums(weights)
    return softmax_gates(Scores(mean, scores.online), groups.exists[:, :, None])


def checkpoint_gates(gates: Gates, groups: Groups, segments: int) -> Gates:
    """Gates on segments' states: a group's memory is the checkpoint at its end."""
    at_end = jax.nn.one_hot(groups.end, segments, dtype=gates.cached.dtype)  # [B, T, J, S]
    return Gates(gates.online, jnp.einsum("bthj,btjs->bths", gates.cached, at_end))


def merged_gates(gates: Gates, groups: Groups, log_retention: jax.Array) -> Gates:
    """Gates on segments' states where a group's memory is the linear memory run over all its tokens.

    M_group = sum_s (decay from s's end to the group's end) M_s.

    Args:
      gates: of the groups.
      groups: of each token.
      log_retention: sum of a segment's log retentions [B, S, H].
    """
    segments = log_retention.shape[1]
    total = jnp.cumsum(log_retention, axis=1).swapaxes(1, 2)[:, None]  # [B, 1, H, S], through s's end
    position = jnp.arange(segments, dtype=jnp.int32)[None, None]
    cached = jnp.zeros((*gates.cached.shape[:3], segments), gates.cached.dtype)
    for level in range(gates.cached.shape[-1]):
        start, end = groups.start[..., level, None], groups.end[..., level, None]  # [B, T, 1]
        inside = (position >= start) & (position <= end)  # [B, T, S]
        at_end = jnp.take_along_axis(
            jnp.broadcast_to(total, cached.shape),
            jnp.broadcast_to(end[:, :, None], (*cached.shape[:3], 1)),
            axis=-1,
        )
        decay = jnp.exp(jnp.where(inside[:, :, None], at_end - total, -jnp.inf))
        cached = cached + gates.cached[..., level, None] * decay
    return Gates(gates.online, cached)

"""The growing cache with which decoding goes on: a pytree of the online memory and the cached ones.

Shapes: B batch, N capacity in cached states, P router blocks, H heads, K key dim, V value dim, R router dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mc_jax.caching.aggregations import AGGREGATIONS
from mc_jax.caching.reading import Cached
from mc_jax.caching.router import Pooled
from mc_jax.caching.settings import Settings
from pallas_kernels._state import OnlineState, Weights, batch_weights, select_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """What is known of the segment that is being written; its document's tokens alone count."""

    key_sum: jax.Array | None
    """Sum of the router keys in each block [B, P, H, R]; None without a router."""
    key_count: jax.Array
    """Tokens in each of those sums [B, P], float."""
    log_retention: jax.Array | None
    """Sum of log a [B, H]; None where segments are not merged."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """What a row of tokens leaves behind. Rows of a batch may differ in length."""

    online: OnlineState
    """The memory of the current segment."""
    segment: Segment
    """What will be cached with it."""
    cached: Cached
    """Cached memories, oldest first; those at and past `count` are empty places."""
    pooled: Pooled | None
    """Router keys of the cached memories; None where the aggregation has no router."""
    length: jax.Array
    """Tokens written so far [B], int32, counted from the row's start."""
    count: jax.Array
    """Cached memories that may be read [B], int32."""
    initial: Weights | None
    """What an independent segment starts from; None: zeros."""
    settings: Settings = dataclasses.field(metadata={"static": True})
    """How the cache was written, and so how it is read."""

    @property
    def capacity(self) -> int:
        """Places for cached memories."""
        return self.cached.tokens.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def with_capacity(self, capacity: int) -> "Cache":
        """The same cache with `capacity` places, so that it can grow.

        Raises:
          ValueError: if that is fewer than there are.
        """
        more = capacity - self.capacity
        if more < 0:
            raise ValueError(f"capacity {capacity} is less than the cache has; give {self.capacity} or more")

        def grow(leaf: jax.Array) -> jax.Array:
            return jnp.pad(leaf, [(0, 0), (0, more)] + [(0, 0)] * (leaf.ndim - 2))

        return dataclasses.replace(
            self, cached=jax.tree.map(grow, self.cached), pooled=jax.tree.map(grow, self.pooled)
        )


def restart(online: OnlineState, initial: Weights | None) -> OnlineState:
    """The state before a segment's first token that owes nothing to what came before."""
    zeros = jax.tree.map(jnp.zeros_like, online)
    if initial is None:
        return zeros
    leaf = jax.tree.leaves(online.weights)[0]
    weights = batch_weights(initial, leaf.shape[0], leaf.dtype)
    anchor = None if online.anchor is None else weights
    return dataclasses.replace(zeros, weights=weights, anchor=anchor)


def write_segment(
    segment: Segment, position: jax.Array, settings: Settings, router_key, log_retention
) -> Segment:
    """Count one token a row, the one at `position` [B] in its segment, with its router key [B, H, R]."""
    blocks = segment.key_count.shape[1]
    block = position // (settings.segment_length // blocks)
    here = jax.nn.one_hot(block, blocks, dtype=segment.key_count.dtype)
    key_sum, log_sum = segment.key_sum, segment.log_retention
    if key_sum is not None:
        key_sum = key_sum + here[:, :, None, None] * router_key[:, None]
    if log_sum is not None:
        log_sum = log_sum + log_retention
    return Segment(key_sum=key_sum, key_count=segment.key_count + here, log_retention=log_sum)


def append_token(cache: Cache, online: OnlineState, segment: Segment) -> Cache:
    """The cache after one more token a row; a segment that it completes is cached.

    Args:
      cache: the cache before the token.
      online: the online state after it.
      segment: what is known of its segment with it.
    """
    length = cache.length + 1
    completed = length % cache.settings.segment_length == 0
    # Rows that complete nothing write back what the place held.
    place = jnp.minimum(cache.count, cache.capacity - 1)

    def put(stored: jax.Array, new: jax.Array) -> jax.Array:
        def put_row(row, new_row, index, write):
            return row.at[index].set(jnp.where(write, new_row.astype(row.dtype), row[index]))

        return jax.vmap(put_row)(stored, new, place, completed)

    cached, pooled = cache.cached, cache.pooled
    if AGGREGATIONS[cache.settings.aggregation].gates is not None:
        tokens = jnp.sum(segment.key_count, axis=1)
        new = Cached(online.weights, tokens, segment.log_retention)
        cached = jax.tree.map(put, cached, new)
        if pooled is not None:
            assert segment.key_sum is not None
            mean = segment.key_sum / jnp.maximum(segment.key_count, 1)[..., None, None]
            pooled = jax.tree.map(put, pooled, Pooled(mean, segment.key_count))
    segment = select_rows(completed, jax.tree.map(jnp.zeros_like, segment), segment)
    if cache.settings.segment_init == "independent":
        online = select_rows(completed, restart(online, cache.initial), online)
    return dataclasses.replace(
        cache,
        online=online,
        segment=segment,
        cached=cached,
        pooled=pooled,
        length=length,
        count=jnp.where(completed, cache.count + 1, cache.count),
    )

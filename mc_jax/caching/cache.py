"""The growing cache with which decoding goes on: a pytree of the online memory and the cached ones.

Shapes: B batch, N capacity in cached states, H heads, K key dim, V value dim, R router dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mc_jax.caching.aggregations import AGGREGATIONS
from mc_jax.caching.settings import Settings
from pallas_kernels._state import OnlineState, Weights, batch_weights, select_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """What a row of tokens leaves behind. Rows of a batch may differ in length."""

    online: OnlineState
    """The memory of the current segment."""
    states: Weights
    """Cached states [B, N, H, ...], oldest first; those at and past `count` are empty places."""
    pooled: jax.Array | None
    """Mean router key of each cached segment [B, N, H, R]; None where the aggregation has no router."""
    key_sum: jax.Array | None
    """Sum of the current segment's router keys so far [B, H, R]; None likewise."""
    key_count: jax.Array
    """Tokens in that sum [B], int32."""
    length: jax.Array
    """Tokens written so far [B], int32, counted from the row's start."""
    count: jax.Array
    """Cached states that may be read [B], int32."""
    initial: Weights | None
    """What an independent segment starts from; None: zeros."""
    settings: Settings = dataclasses.field(metadata={"static": True})
    """How the cache was written, and so how it is read."""

    @property
    def capacity(self) -> int:
        """Places for cached states."""
        return jax.tree.leaves(self.states)[0].shape[1]

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
            raise ValueError(
                f"capacity {capacity} is less than the cache's {self.capacity}; give at least that"
            )

        def grow(leaf: jax.Array) -> jax.Array:
            return jnp.pad(leaf, [(0, 0), (0, more)] + [(0, 0)] * (leaf.ndim - 2))

        return dataclasses.replace(
            self, states=jax.tree.map(grow, self.states), pooled=jax.tree.map(grow, self.pooled)
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


def append_token(cache: Cache, online: OnlineState, router_key: jax.Array | None) -> Cache:
    """Count one token a row, whose write led to `online`; a segment that it completes is cached.

    Args:
      cache: the cache before the token.
      online: the online state after it.
      router_key: [B, H, R], or None without a router.
    """
    length = cache.length + 1
    completed = length % cache.settings.segment_length == 0
    key_count = cache.key_count + 1
    key_sum = None if router_key is None else cache.key_sum + router_key
    # Rows that complete nothing write back what the place held.
    place = jnp.minimum(cache.count, cache.capacity - 1)

    def put(stored: jax.Array, new: jax.Array) -> jax.Array:
        def put_row(row, new_row, index, write):
            return row.at[index].set(jnp.where(write, new_row.astype(row.dtype), row[index]))

        return jax.vmap(put_row)(stored, new, place, completed)

    states, pooled = cache.states, cache.pooled
    if AGGREGATIONS[cache.settings.aggregation].gates is not None:
        states = jax.tree.map(put, states, online.weights)
        if key_sum is not None:
            pooled = put(pooled, key_sum / key_count[:, None, None].astype(key_sum.dtype))
            key_sum = jnp.where(completed[:, None, None], 0, key_sum)
    if cache.settings.segment_init == "independent":
        online = select_rows(completed, restart(online, cache.initial), online)
    return dataclasses.replace(
        cache,
        online=online,
        states=states,
        pooled=pooled,
        key_sum=key_sum,
        key_count=jnp.where(completed, 0, key_count),
        length=length,
        count=jnp.where(completed, cache.count + 1, cache.count),
    )

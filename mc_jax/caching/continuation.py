"""Tokens that go on from a cache, many at once: what they may read beside each other, and what they leave.

They are whole segments, and begin one. Shapes: B batch, T tokens, N places of the cache, S segments of the
tokens, H heads.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.caching.cache import Cache, restart
from mc_jax.caching.reading import Cached
from mc_jax.caching.router import Pooled
from mc_jax.caching.storage import Packed, pack, unpack
from pallas_kernels._state import OnlineState


class Joined(NamedTuple):
    """Memories of the cache, oldest first, and after them those of the tokens; then empty places."""

    packed: Packed
    """Their states as the storage has them [B, N + S, H, ...]."""
    cached: Cached
    """The same as they are read, with what is told of them."""
    pooled: Pooled | None
    """Their router keys; None without a router."""
    oldest: jax.Array
    """The number of the first, counted from the row's start [B], int32."""
    count: jax.Array
    """How many there are [B], int32."""


def join(cache: Cache, cached: Cached, pooled: Pooled | None, dtype: jnp.dtype) -> Joined:
    """The memories of a cache and those that the tokens leave, in one order.

    Args:
      cache: with which the tokens go on.
      cached: the states at the ends of their segments [B, S, ...].
      pooled: router keys of these.
      dtype: of states as they are read.
    """
    place, there = cache.by_age()
    held = jnp.sum(there, axis=1, dtype=jnp.int32)
    places, segments = place.shape[1], cached.tokens.shape[1]
    index = jnp.arange(places + segments, dtype=jnp.int32)[None]
    old = jnp.pad(place, ((0, 0), (0, segments)))
    new = jnp.minimum(places + index - held[:, None], places + segments - 1)
    source = jnp.where(index < held[:, None], old, new)

    def gather(before: jax.Array, after: jax.Array) -> jax.Array:
        whole = jnp.concatenate([before, after.astype(before.dtype)], axis=1)
        return jnp.take_along_axis(whole, source.reshape(*source.shape, *[1] * (whole.ndim - 2)), axis=1)

    packed = jax.tree.map(gather, cache.cached.states, pack(cached.states, cache.storage))
    tokens, log_retention = jax.tree.map(
        gather, (cache.cached.tokens, cache.cached.log_retention), (cached.tokens, cached.log_retention)
    )
    return Joined(
        packed,
        Cached(unpack(packed, dtype), tokens, log_retention),
        jax.tree.map(gather, cache.pooled, pooled),
        cache.count - held,
        held + segments,
    )


def eligible(cache: Cache, joined: Joined, length: int) -> jax.Array:
    """Which of the joined memories each of `length` tokens may read [B, T, N + S], bool.

    They are those of completed segments, and where the oldest are dropped, as many of the newest as there are
    places.
    """
    number = joined.oldest[:, None] + jnp.arange(joined.cached.tokens.shape[1], dtype=jnp.int32)[None]
    segment = _segment(cache, length)[..., None]
    readable = number[:, None] < segment
    if cache.storage.when_full == "drop-oldest":
        readable = readable & (number[:, None] >= segment - cache.capacity)
    return readable


def out_of_places(cache: Cache, length: int) -> jax.Array:
    """Tokens [B, T], bool, that come after more memories than a cache has places that drops none."""
    if cache.storage.when_full == "drop-oldest":
        return jnp.zeros((cache.count.shape[0], length), bool)
    return _segment(cache, length) > cache.capacity


def follow(cache: Cache, joined: Joined | None, online: OnlineState, length: int) -> Cache:
    """The cache after `length` tokens, as if they had been decoded one by one.

    Args:
      cache: before them.
      joined: its memories and theirs; None where nothing is cached.
      online: the state after the last token.
      length: whole segments.
    """
    settings = cache.settings
    if settings.segment_init == "independent":
        online = restart(online, cache.initial)
    count = cache.count + length // settings.segment_length
    cached, pooled = cache.cached, cache.pooled
    if joined is not None:
        place = jnp.arange(cache.capacity, dtype=jnp.int32)[None]
        newest = count[:, None] - 1
        # The newest memory that goes to a place; to one past them all none does, and nothing reads it.
        number = newest - (newest - place) % cache.capacity
        source = jnp.maximum(number - joined.oldest[:, None], 0)

        def choose(leaf: jax.Array) -> jax.Array:
            return jnp.take_along_axis(leaf, source.reshape(*source.shape, *[1] * (leaf.ndim - 2)), axis=1)

        rest = dataclasses.replace(joined.cached, states=joined.packed)
        cached, pooled = jax.tree.map(choose, (rest, joined.pooled))
    return dataclasses.replace(
        cache,
        online=online,
        segment=jax.tree.map(jnp.zeros_like, cache.segment),
        cached=cached,
        pooled=pooled,
        length=cache.length + length,
        count=count,
    )


def empty(cache: Cache) -> Cache:
    """The cache before a row's first token, from one after some, or from its shapes alone."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    online = restart(zeros.online, cache.initial)
    return dataclasses.replace(zeros, online=online, initial=cache.initial)


def _segment(cache: Cache, length: int) -> jax.Array:
    """The number of each token's segment, counted from the row's start [B, T], int32."""
    own = jnp.arange(length, dtype=jnp.int32) // cache.settings.segment_length
    return cache.length[:, None] // cache.settings.segment_length + own[None]

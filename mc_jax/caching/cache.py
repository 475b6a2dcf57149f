"""The growing cache with which decoding goes on: a pytree of the online memory and the cached ones.

Shapes: B batch, N capacity in cached states, P router blocks, H heads, K key dim, V value dim, R router dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mc_jax.caching.reading import Cached
from mc_jax.caching.router import Pooled
from mc_jax.caching.settings import Settings
from mc_jax.caching.storage import Packed, Storage, pack, put, put_states, to_place, unpack
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
    """Cached memories, the n-th in place n, or, where the oldest are dropped, n modulo capacity; their states
    as the storage has them."""
    pooled: Pooled | None
    """Router keys of the cached memories; None where the aggregation has no router."""
    length: jax.Array
    """Tokens written so far [B], int32, counted from the row's start."""
    count: jax.Array
    """Memories that were put into the cache [B], int32; the newest `capacity` of them are there."""
    initial: Weights | None
    """What an independent segment starts from; None: zeros."""
    settings: Settings = dataclasses.field(metadata={"static": True})
    """How the cache was written, and so how it is read."""
    storage: Storage = dataclasses.field(default=Storage(), metadata={"static": True})
    """How its cached memories are kept."""

    @property
    def capacity(self) -> int:
        """Places for cached memories."""
        return self.cached.tokens.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def state_nbytes(self) -> int:
        """Bytes of the cached states alone, what grows with the text."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.cached.states))

    def with_storage(self, storage: Storage) -> "Cache":
        """The same memories, kept otherwise: with more places, so that the cache can grow, or with fewer.

        Raises:
          ValueError: fewer places than there are, and the oldest must not be dropped; a storage that has no
            effect, or that cannot be read as the settings tell.
        """
        _check_storage(self.settings, storage)
        places = self.capacity if storage.max_cached is None else storage.max_cached
        if places < self.capacity and storage.when_full == "error":
            raise ValueError(
                f"max_cached {places} is less than the cache has; set it to {self.capacity} or more, "
                "or when_full to 'drop-oldest'"
            )
        held = jnp.minimum(jnp.minimum(self.count, self.capacity), places)
        age = jnp.arange(places, dtype=jnp.int32)[None]
        # An empty place has a copy of some memory, which nothing reads.
        number = self.count[:, None] - held[:, None] + jnp.where(age < held[:, None], age, 0)
        source = number % max(self.capacity, 1)

        def move(leaf: jax.Array) -> jax.Array:
            if not leaf.shape[1]:
                return jnp.zeros((leaf.shape[0], places, *leaf.shape[2:]), leaf.dtype)
            return jnp.take_along_axis(leaf, source.reshape(*source.shape, *[1] * (leaf.ndim - 2)), axis=1)

        states = to_place(self.cached.states, Storage())
        if self.storage.state_dtype != storage.state_dtype:
            dtype = jax.tree.leaves(self.online.weights)[0].dtype
            states = pack(unpack(states, dtype), storage)
        cached = dataclasses.replace(self.cached, states=states)
        cached, pooled = jax.tree.map(move, (cached, self.pooled))
        # That places were missing is not forgotten.
        count = held
        if self.storage.when_full == storage.when_full == "error":
            count = jnp.where(self.count > self.capacity, places + 1, held)
        return dataclasses.replace(
            self,
            cached=dataclasses.replace(cached, states=to_place(cached.states, storage)),
            pooled=pooled,
            count=count,
            storage=storage,
        )

    def by_age(self) -> tuple[jax.Array, jax.Array]:
        """The place of each memory, oldest first [B, capacity], int32, and which of those there are, bool."""
        held = jnp.minimum(self.count, self.capacity)[:, None]
        age = jnp.arange(self.capacity, dtype=jnp.int32)[None]
        place = (self.count[:, None] - held + age) % max(self.capacity, 1)
        return place, age < held

    def next_place(self) -> tuple[jax.Array, jax.Array]:
        """The place that each row's next token leaves its state at [B], int32, and whether it does, bool.

        It does where it completes a segment for which there is a place.
        """
        completed = (self.length + 1) % self.settings.segment_length == 0
        if self.storage.when_full == "error":
            completed = completed & (self.count < self.capacity)
        return self.count % max(self.capacity, 1), completed

    def overflowed(self) -> jax.Array:
        """Rows [B] that had more memories to cache than places; their reads are NaN from there on."""
        if self.storage.when_full == "drop-oldest" or not self.settings.about.reads_cache:
            return jnp.zeros(self.count.shape, bool)
        return self.count > self.capacity

    def check(self) -> None:
        """Refuse a cache that was too small; for use outside of compiled code.

        Raises:
          ValueError: rows that had more memories to cache than places.
        """
        full = [int(row) for row in jnp.flatnonzero(self.overflowed())]
        if full:
            raise ValueError(
                f"the cache is full: rows {full} completed more segments than its {self.capacity} places; "
                "set max_cached higher, or when_full to 'drop-oldest'"
            )


def _check_storage(settings: Settings, storage: Storage) -> None:
    if not settings.about.reads_cache and storage != Storage():
        raise ValueError(
            f"a storage has no effect with aggregation {settings.aggregation!r}, which caches nothing; "
            "leave it out"
        )
    if storage.when_full == "drop-oldest" and settings.segmentation == "logarithmic":
        raise ValueError(
            "segmentation 'logarithmic' groups all segments since the start and cannot drop the oldest; "
            "set when_full to 'error'"
        )
    if storage.place == "host" and (not settings.selects or settings.selected_read == "dense"):
        raise ValueError(
            "place 'host' is for sparse reads, which fetch few states; set aggregation to 'sparse', without "
            "a dense selected_read, or place to 'device'"
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


def append_token(cache: Cache, online: OnlineState, segment: Segment, states: Packed | None = None) -> Cache:
    """The cache after one more token a row; a segment that it completes is cached.

    Args:
      cache: the cache before the token.
      online: the online state after it.
      segment: what is known of its segment with it.
      states: the cached states where the completed one is among them already; None: it is put there.
    """
    length = cache.length + 1
    completed = length % cache.settings.segment_length == 0
    cached, pooled = cache.cached, cache.pooled
    if cache.settings.about.reads_cache and cache.capacity:
        place, write = cache.next_place()
        if states is None:
            new = pack(online.weights, cache.storage)
            states = put_states(cached.states, new, place, write, cache.storage)
        tokens = jnp.sum(segment.key_count, axis=1)
        rest = put((cached.tokens, cached.log_retention), (tokens, segment.log_retention), place, write)
        cached = Cached(states, *rest)
        if pooled is not None:
            assert segment.key_sum is not None
            mean = segment.key_sum / jnp.maximum(segment.key_count, 1)[..., None, None]
            pooled = put(pooled, Pooled(mean, segment.key_count), place, write)
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

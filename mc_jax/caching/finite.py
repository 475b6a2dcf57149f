"""Numbers that are not finite, and which tokens they reach: those that depend on them, and no other.

0 times NaN is NaN, so products with masks of zeros, as there are in every chunk, would carry it to earlier
tokens and to other documents. So what is not finite is taken for zeros, and all that depends on it is made
NaN afterwards.

Shapes: B batch, T tokens, S segments, H heads, N cached states.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.caching.cache import Cache
from mc_jax.caching.neighbours import Neighbours
from mc_jax.caching.reading import Routing
from mc_jax.memories import Coefficients
from pallas_kernels._finite import marked, not_finite, zeroed


class Tokens(NamedTuple):
    """What `forward` is given of each token [B, T, H, ...]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    coefficients: Coefficients
    routing: Routing | None


class Reach(NamedTuple):
    """Which reads and states depend on a token that is not finite."""

    reads: jax.Array
    """Whether a read does, by its query or the online memory [B, T, H], bool."""
    online: jax.Array
    """The memory after each token [B, T, H], bool."""

    def ends(self, segment_length: int) -> jax.Array:
        """The memory at the end of each segment [B, S, H], bool, a last one that is short included."""
        short = -self.online.shape[1] % segment_length
        padded = jnp.pad(self.online, ((0, 0), (0, short), (0, 0)), mode="edge")
        return padded[:, segment_length - 1 :: segment_length]


def without_bad(tokens: Tokens) -> tuple[Tokens, jax.Array, jax.Array]:
    """The tokens with zeros for what is not finite; where that was in writes, in queries [B, T, H], bool."""
    q, k, v, coefficients, routing = tokens
    u, keys, logit, scale = (None,) * 4 if routing is None else routing
    writes = not_finite(k, v, keys, *coefficients, axes=3)
    queries = not_finite(q, u, logit, scale, axes=3)
    k, v, keys, coefficients = zeroed((k, v, keys, coefficients), writes)
    q, u, logit, scale = zeroed((q, u, logit, scale), queries)
    routing = None if routing is None else Routing(u, keys, logit, scale)
    return Tokens(q, k, v, coefficients, routing), writes, queries


def reach_of(
    writes: jax.Array,
    queries: jax.Array,
    document_ids: jax.Array | None,
    segment_length: int | None,
    neighbours: Neighbours | None,
    goes_on: jax.Array,
) -> Reach:
    """What bad tokens reach.

    Args:
      writes: tokens of this device that write what is not finite [B, T, H], bool.
      queries: tokens that ask for what is not finite [B, T, H], bool.
      document_ids: [B, T]; None: a row is one document.
      segment_length: where each segment's memory starts anew; None: it goes on from the last one's.
      neighbours: devices that share the rows; None: this one has whole rows.
      goes_on: tokens of the document of the token before this device's first [B, T], bool.
    """
    earliest = None
    if segment_length is not None:
        earliest = jnp.arange(writes.shape[1], dtype=jnp.int32) // segment_length * segment_length
    online = from_there_on(writes, document_ids, earliest)
    if neighbours is not None and segment_length is None:
        online = online | (neighbours.reaches(online[:, -1], goes_on[:, -1])[:, None] & goes_on[..., None])
    return Reach(online | queries, online)


def from_there_on(
    bad: jax.Array, document_ids: jax.Array | None, earliest: jax.Array | None = None
) -> jax.Array:
    """Tokens that see a bad one, themselves or an earlier one of their document [B, T, H], bool.

    Args:
      bad: [B, T, H], bool.
      document_ids: [B, T]; None: a row is one document.
      earliest: the first token that each sees [T], int32, if it is of its document; None: the row's.
    """
    position = jnp.arange(bad.shape[1], dtype=jnp.int32)[None]
    start = jnp.zeros_like(position) if earliest is None else jnp.maximum(earliest, 0)[None]
    if document_ids is not None:
        changes = jnp.pad(document_ids[:, 1:] != document_ids[:, :-1], ((0, 0), (1, 0)))
        start = jnp.maximum(start, jax.lax.cummax(jnp.where(changes, position, 0), axis=1))
    last_bad = jax.lax.cummax(jnp.where(bad, position[..., None], -1), axis=1)
    return last_bad >= start[..., None]


def seen_by_convolution(bad: jax.Array, document_ids: jax.Array | None, width: int) -> jax.Array:
    """Tokens [B, T], bool, with a bad one among the last `width` of their document, themselves included."""
    seen = bad
    for distance in range(1, min(width, bad.shape[1])):
        before = bad[:, :-distance]
        if document_ids is not None:
            before = before & (document_ids[:, distance:] == document_ids[:, :-distance])
        seen = seen | jnp.pad(before, ((0, 0), (distance, 0)))
    return seen


def misaligned_documents(document_ids: jax.Array, chunk_length: int) -> jax.Array:
    """Tokens that begin a document within a chunk [B, T], bool.

    Raises:
      ValueError: there are some, and that can be told at once.
    """
    changes = jnp.pad(document_ids[:, 1:] != document_ids[:, :-1], ((0, 0), (1, 0)))
    position = jnp.arange(document_ids.shape[1], dtype=jnp.int32)[None]
    wrong = changes & (position % chunk_length != 0)
    if not isinstance(wrong, jax.core.Tracer) and jnp.any(wrong):
        row, token = (int(index[0]) for index in jnp.nonzero(wrong))
        raise ValueError(
            f"a document of row {row} starts at token {token}, within a chunk of {chunk_length}, which this "
            "memory writes at one gradient; pad documents to whole chunks, or set chunk_length to 1"
        )
    return wrong


def mark_begun(cache: Cache, bad: jax.Array) -> Cache:
    """The cache with NaN in what it has of the segment that is being written, in bad heads [B, H] of rows."""
    key_sum, log_retention = cache.segment.key_sum, cache.segment.log_retention
    if key_sum is not None:
        key_sum = marked(key_sum.swapaxes(1, 2), bad).swapaxes(1, 2)
    log_retention = marked(log_retention, bad)
    segment = dataclasses.replace(cache.segment, key_sum=key_sum, log_retention=log_retention)
    return dataclasses.replace(cache, segment=segment)

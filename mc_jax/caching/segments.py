"""The places of segments and documents in a row, and which cached segments a token may read.

Shapes: B batch, T tokens, S segments, L segment length.
"""

import jax
import jax.numpy as jnp


def num_segments(length: int, segment_length: int) -> int:
    """Segments in `length` tokens, the last, possibly short, one included."""
    return -(-length // segment_length)


def split(x: jax.Array, segment_length: int) -> jax.Array:
    """[batch, length, ...] -> [batch, segments, segment_length, ...], zeros after the row's end."""
    batch, length = x.shape[:2]
    segments = num_segments(length, segment_length)
    padding = [(0, 0), (0, segments * segment_length - length)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding).reshape(batch, segments, segment_length, *x.shape[2:])


def normalize_documents(document_ids: jax.Array) -> jax.Array:
    """Number a row's documents 0, 1, 2, ... from any ids [batch, length] that change at their starts."""
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def segment_documents(document_ids: jax.Array, segment_length: int) -> jax.Array:
    """The document a segment's cached state belongs to: that of its last token [batch, segments]."""
    length = document_ids.shape[1]
    segments = jnp.arange(num_segments(length, segment_length), dtype=jnp.int32)
    ends = segments * segment_length + segment_length - 1
    return document_ids[:, jnp.minimum(ends, length - 1)]


def first_of_document(owners: jax.Array) -> jax.Array:
    """The first segment that belongs to the same document as each one [batch, segments], int32."""
    starts = jnp.pad(owners[:, 1:] != owners[:, :-1], ((0, 0), (1, 0)))
    position = jnp.arange(owners.shape[1], dtype=jnp.int32)[None]
    return jax.lax.cummax(jnp.where(starts, position, 0), axis=1)


def owned(document_ids: jax.Array, segment_length: int) -> jax.Array:
    """Tokens that count for their segment's cached state [batch, segments, segment_length], bool.

    A segment's state and pooled key belong to the last document in it (docs/math.md section 2).
    """
    # Ids are shifted by one, so that the padding past the row's end belongs to no document.
    return (
        split(document_ids + 1, segment_length)
        == (segment_documents(document_ids, segment_length) + 1)[:, :, None]
    )


def eligible(
    document_ids: jax.Array, owners: jax.Array, segment_length: int, first_segment: jax.Array | int = 0
) -> jax.Array:
    """Which segments a token may read [batch, length, segments], bool: completed ones of its document.

    Args:
      document_ids: of the tokens [batch, length], numbered along the whole row.
      owners: of all segments of the row [batch, segments], as `segment_documents` has them.
      segment_length: tokens in a segment.
      first_segment: the one that the tokens begin.
    """
    own_segment = first_segment + jnp.arange(document_ids.shape[1], dtype=jnp.int32) // segment_length
    completed = jnp.arange(owners.shape[1], dtype=jnp.int32)[None, :] < own_segment[:, None]
    return completed[None] & (document_ids[:, :, None] == owners[:, None, :])

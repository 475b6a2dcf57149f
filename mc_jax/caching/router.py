"""The router: pooled keys of segments, their scores, and the online memory's logit (docs/math.md section 3).

Shapes: B batch, T tokens, S segments, P blocks of a segment, L tokens of one, H heads, R router dim. All in
float32 or wider.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.caching import segments


class Pooled(NamedTuple):
    """Mean router keys of segments."""

    mean: jax.Array
    """[B, S, P, H, R]."""
    tokens: jax.Array
    """In each mean [B, S, P], of the same dtype; 0 where a block has none."""


def pool(router_keys: jax.Array, document_ids: jax.Array, segment_length: int, blocks: int = 1) -> Pooled:
    """Mean router keys of the segments' equal blocks (MC eq. 16; one block: the paper's).

    The mean, where the paper prints a sum: a sum of hundreds of unit keys makes the softmax one-hot.

    Args:
      router_keys: [batch, length, heads, router_dim].
      document_ids: [batch, length]; only the last document in a segment is pooled.
      segment_length: tokens in a segment.
      blocks: parts of a segment; divides segment_length.
    """
    owned = segments.owned(document_ids, segment_length)
    owned = owned.reshape(owned.shape[0], owned.shape[1], blocks, -1).astype(router_keys.dtype)
    keys_BSLHR = segments.split(router_keys, segment_length)
    keys_BSPLHR = keys_BSLHR.reshape(*owned.shape, *keys_BSLHR.shape[3:])
    tokens = jnp.sum(owned, axis=3)
    total = jnp.einsum("bspl,bsplhr->bsphr", owned, keys_BSPLHR)
    return Pooled(total / jnp.maximum(tokens, 1)[..., None, None], tokens)


def score(u: jax.Array, pooled: Pooled) -> jax.Array:
    """Max over blocks of <u_t, mean key>: [batch, length, heads, segments] from u [B, T, H, R]."""
    scores = jnp.einsum("bthr,bsphr->bthsp", u, pooled.mean)
    if scores.shape[-1] == 1:
        return scores[..., 0]
    return jnp.max(jnp.where(pooled.tokens[:, None, None] > 0, scores, -jnp.inf), axis=-1)


def running_mean_logit(u: jax.Array, router_keys: jax.Array, segment_length: int) -> jax.Array:
    """The online memory's logit without a learned map: <u_t, mean of its segment's keys up to t>.

    The paper pools the current segment too; a mean over all of it would leak the future, so the mean
    runs up to and with t. Documents need no care: in the segment where one starts it has no cached memory
    to weigh against the online one.

    Args:
      u: [batch, length, heads, router_dim].
      router_keys: [batch, length, heads, router_dim].
      segment_length: tokens in a segment.

    Returns:
      [batch, length, heads].
    """
    batch, length = u.shape[:2]
    sums_BSLHR = jnp.cumsum(segments.split(router_keys, segment_length), axis=2)
    counts = jnp.arange(1, segment_length + 1).astype(u.dtype)
    mean = sums_BSLHR / counts[None, None, :, None, None]
    mean = mean.reshape(batch, -1, *mean.shape[3:])[:, :length]
    return jnp.sum(u * mean, axis=-1)

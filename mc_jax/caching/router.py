"""The router: pooled keys of segments, their scores, and the online memory's logit (MATH.md section 3).

Shapes: B batch, T tokens, S segments, L segment length, H heads, R router dim. All in float32 or wider.
"""

import jax
import jax.numpy as jnp

from mc_jax.caching import segments


def pool(router_keys: jax.Array, document_ids: jax.Array | None, segment_length: int) -> jax.Array:
    """Mean router key of each segment [batch, segments, heads, router_dim] (MC eq. 16).

    The mean, where the paper prints a sum: a sum of hundreds of unit keys makes the softmax one-hot.

    Args:
      router_keys: [batch, length, heads, router_dim].
      document_ids: [batch, length] or None; only the last document in a segment is pooled.
      segment_length: tokens in a segment.
    """
    batch, length = router_keys.shape[:2]
    weights = segments.owned(document_ids, batch, length, segment_length).astype(router_keys.dtype)
    keys_BSLHR = segments.split(router_keys, segment_length)
    total = jnp.einsum("bsl,bslhr->bshr", weights, keys_BSLHR)
    return total / jnp.sum(weights, axis=2)[:, :, None, None]


def score(u: jax.Array, pooled: jax.Array) -> jax.Array:
    """<u_t, pooled_i>: [batch, length, heads, segments] from [B, T, H, R] and [B, S, H, R]."""
    return jnp.einsum("bthr,bshr->bths", u, pooled)


def running_mean_logit(
    u: jax.Array, router_keys: jax.Array, document_ids: jax.Array | None, segment_length: int
) -> jax.Array:
    """The online memory's logit without a learned map: <u_t, mean of its segment's keys up to t>.

    The paper pools the current segment too; a mean over all of it would leak the future, so the mean
    runs up to and with t, over t's own document.

    Args:
      u: [batch, length, heads, router_dim].
      router_keys: [batch, length, heads, router_dim].
      document_ids: [batch, length] or None.
      segment_length: tokens in a segment.

    Returns:
      [batch, length, heads].
    """
    batch, length = u.shape[:2]
    sums_BSLHR = jnp.cumsum(segments.split(router_keys, segment_length), axis=2)
    position = jnp.broadcast_to(jnp.arange(segment_length)[None, None], sums_BSLHR.shape[:3])
    first = jnp.zeros_like(position)
    if document_ids is not None:
        ids = segments.split(document_ids, segment_length)
        starts = jnp.pad(ids[:, :, 1:] != ids[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
        first = jax.lax.cummax(jnp.where(starts, position, 0), axis=2)
        before = jnp.pad(sums_BSLHR, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
        sums_BSLHR -= jnp.take_along_axis(before, first[..., None, None], axis=2)
    mean = sums_BSLHR / (position - first + 1).astype(u.dtype)[..., None, None]
    mean = mean.reshape(batch, -1, *mean.shape[3:])[:, :length]
    return jnp.sum(u * mean, axis=-1)

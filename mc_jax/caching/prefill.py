"""The cache that a parallel run leaves behind.

Shapes: B batch, T tokens, S segments, P router blocks, H heads, R router dim.
"""

import jax
import jax.numpy as jnp

from mc_jax.caching import segments
from mc_jax.caching.cache import Cache, Segment, restart
from mc_jax.caching.reading import Cached, Routing
from mc_jax.caching.router import Pooled
from mc_jax.caching.settings import Settings
from pallas_kernels._state import OnlineState, Weights, select_rows


def cache_after(
    lengths: jax.Array,
    *,
    online: OnlineState,
    cached: Cached,
    pooled: Pooled | None,
    routing: Routing | None,
    log_retention: jax.Array | None,
    document_ids: jax.Array,
    initial: Weights | None,
    settings: Settings,
) -> Cache:
    """The cache after tokens 0 .. lengths-1 of each row, as if they had been decoded one by one.

    Args:
      lengths: [B], int32.
      online: the state after each row's last token.
      cached: the states at all segment ends.
      pooled: router keys of all segments, or None.
      routing: of all tokens, or None.
      log_retention: of all tokens [B, T, H], or None where segments are not merged.
      document_ids: [B, T].
      initial: what an independent segment starts from.
      settings: how the cache is written and read.
    """
    last = jnp.take_along_axis(document_ids, lengths[:, None] - 1, axis=1)
    if not settings.about.reads_cache:
        cached = jax.tree.map(lambda x: x[:, :0], cached)  # nothing will read them
    # Only completed segments of the last document may be read: they move to the front.
    owners = segments.segment_documents(document_ids, settings.segment_length)
    completed = (
        jnp.arange(owners.shape[1], dtype=jnp.int32)[None] < (lengths // settings.segment_length)[:, None]
    )
    mine = (owners == last) & completed
    order = jnp.argsort(~mine, axis=1, stable=True)

    def reorder(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(
            x, order[:, : x.shape[1]].reshape(*x.shape[:2], *[1] * (x.ndim - 2)), axis=1
        )

    cached, pooled = jax.tree.map(reorder, (cached, pooled))
    if settings.segment_init == "independent":
        online = select_rows(lengths % settings.segment_length == 0, restart(online, initial), online)
    position = jnp.arange(document_ids.shape[1], dtype=jnp.int32)
    current = (
        (position[None] // settings.segment_length == (lengths // settings.segment_length)[:, None])
        & (position[None] < lengths[:, None])
        & (document_ids == last)
    )
    # A cache is made to be donated: nothing in it may be the caller's own array.
    lengths, initial = jax.tree.map(jnp.copy, (lengths, initial))
    return Cache(
        online=online,
        segment=_unfinished(current, position, routing, log_retention, cached.tokens.dtype, settings),
        cached=cached,
        pooled=pooled,
        length=lengths,
        count=jnp.sum(mine, axis=1, dtype=jnp.int32),
        initial=initial,
        settings=settings,
    )


def _unfinished(current, position, routing, log_retention, dtype, settings: Settings) -> Segment:
    """The segment that a row's `current` tokens [B, T] have begun."""
    block_length = settings.segment_length // settings.router_blocks
    block = position % settings.segment_length // block_length
    in_block = jax.nn.one_hot(block, settings.router_blocks, dtype=dtype)
    current = current.astype(dtype)
    key_sum = log_sum = None
    if routing is not None and routing.keys is not None:
        key_sum = jnp.einsum("bt,tp,bthr->bphr", current, in_block, routing.keys)
    if log_retention is not None:
        log_sum = jnp.einsum("bt,bth->bh", current, log_retention)
    return Segment(
        key_sum=key_sum, key_count=jnp.einsum("bt,tp->bp", current, in_block), log_retention=log_sum
    )

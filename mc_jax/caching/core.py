"""Memory Caching in its parallel form, and one token at a time (arXiv:2602.24281; MATH.md sections 1-3).

Shapes: B batch, T tokens, S segments, N cached states, H heads, K key dim, V value dim, R router dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.caching import router, segments
from mc_jax.caching.aggregations import AGGREGATIONS, Gates
from mc_jax.caching.cache import Cache, append_token, restart
from mc_jax.caching.settings import Settings
from mc_jax.memories import MEMORIES, Coefficients, Layout, Memory, MemoryRun
from pallas_kernels._state import OnlineState, Weights, select_rows


class Routing(NamedTuple):
    """What the router needs of each token; all in the dtype of states, [B, T, H, ...]."""

    u: jax.Array
    """The router's query [B, T, H, R]."""
    keys: jax.Array
    """What is pooled over a segment [B, T, H, R]."""
    online_logit: jax.Array | None
    """A learned logit for the online memory [B, T, H]; None: the running mean of `keys` is scored."""


class Output(NamedTuple):
    """What `forward` finds."""

    y: jax.Array
    """[B, T, H, V]."""
    gates: Gates | None
    """Weights of the memories in each token's read; None where only the online memory is read."""
    cache: Cache
    """With which decoding goes on after the last token."""


def memory_caching(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    u: jax.Array | None = None,
    *,
    memory: str = "linear",
    aggregation: str = "gated",
    segment_length: int = 256,
    segment_init: str = "checkpoint",
    router_keys: jax.Array | None = None,
    online_logit: jax.Array | None = None,
    retention: jax.Array | None = None,
    step: jax.Array | None = None,
    document_ids: jax.Array | None = None,
    initial_state: Weights | None = None,
    chunk_length: int = 64,
    implementation: str | None = None,
) -> tuple[jax.Array, Cache]:
    """Write all tokens to a recurrent memory, cache its state at every segment's end, read them together.

    Args:
      q: queries [batch, length, heads, key_dim]; l2-normalised queries and keys are expected, not made.
      k: keys [batch, length, heads, key_dim].
      v: values [batch, length, heads, value_dim].
      u: router queries [batch, length, heads, router_dim]; None only where the aggregation has no router.
      memory: the recurrence, a key of `mc_jax.memories.MEMORIES`.
      aggregation: how the memories are read, a key of `mc_jax.caching.aggregations.AGGREGATIONS`.
      segment_length: tokens after which the state is cached; the last segment may be short.
      segment_init: "checkpoint" (a segment goes on from the last state) or "independent".
      router_keys: what is pooled over a segment [batch, length, heads, router_dim]; None: k.
      online_logit: a learned logit for the online memory [batch, length, heads]; None: the score of the
        running mean of router keys over the segment so far.
      retention: a_t [batch, length, heads] in (0, 1]; None: 1.
      step: h_t [batch, length, heads]; None: 1.
      document_ids: [batch, length], int; packed documents never see each other. None: one document a row.
      initial_state: [heads, key_dim, value_dim], a leading batch axis allowed; None: zeros.
      chunk_length: tokens handled together by matrix products; divides segment_length.
      implementation: of the ops beneath; None picks the best for the platform.

    Returns:
      y [batch, length, heads, value_dim] of v's dtype (MC eq. 5), and the cache to decode on with.

    Raises:
      ValueError: names that are not known, shapes that do not fit, a setting that would have no effect.
    """
    settings = Settings(
        memory=memory,
        aggregation=aggregation,
        segment_length=segment_length,
        segment_init=segment_init,
        chunk_length=chunk_length,
        implementation=implementation,
    )
    routing = None
    if AGGREGATIONS[aggregation].uses_router:
        if u is None:
            raise ValueError(f"aggregation {aggregation!r} has a router; give its queries u")
        routing = Routing(u, k if router_keys is None else router_keys, online_logit)
    else:
        for name, value in (("u", u), ("router_keys", router_keys), ("online_logit", online_logit)):
            if value is not None:
                raise ValueError(f"{name} has no effect with aggregation {aggregation!r}; leave it out")
    output = forward(
        q,
        k,
        v,
        routing,
        Coefficients(retention=retention, step=step),
        settings,
        document_ids=document_ids,
        initial_state=initial_state,
    )
    return output.y, output.cache


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    routing: Routing | None,
    coefficients: Coefficients,
    settings: Settings,
    *,
    document_ids: jax.Array | None = None,
    initial_state: Weights | None = None,
    lengths: jax.Array | None = None,
) -> Output:
    """`memory_caching` for a caller that has its settings at hand; `lengths` [B] makes rows end early.

    Tokens at and past a row's length are not written; what is read there has no meaning.
    """
    batch, length = q.shape[:2]
    memory, aggregation = MEMORIES[settings.memory], AGGREGATIONS[settings.aggregation]
    if document_ids is not None:
        document_ids = segments.normalize_documents(document_ids)
    run = memory.run(
        q,
        k,
        v,
        coefficients,
        Layout(
            segment_length=settings.segment_length,
            segment_init=settings.segment_init,
            chunk_length=settings.chunk_length,
            implementation=settings.implementation,
        ),
        initial_state=initial_state,
        document_ids=document_ids,
        lengths=lengths,
    )
    dtype = jax.tree.leaves(run.segment_states)[0].dtype
    routing = None if routing is None else jax.tree.map(lambda x: x.astype(dtype), routing)
    gates = pooled = None
    if aggregation.gates is not None:
        scores = online_logit = None
        if routing is not None:
            pooled = router.pool(routing.keys, document_ids, settings.segment_length)
            scores = router.score(routing.u, pooled)
            online_logit = routing.online_logit
            if online_logit is None:
                online_logit = router.running_mean_logit(
                    routing.u, routing.keys, document_ids, settings.segment_length
                )
        eligible = segments.eligible(document_ids, batch, length, settings.segment_length)
        gates = aggregation.gates(scores, online_logit, eligible)
    y = _read(memory, q, run.reads, gates, run.segment_states)
    if lengths is None:
        lengths = jnp.full((batch,), length, jnp.int32)
    cache = _cache(run, routing, pooled, document_ids, lengths, initial_state, settings)
    return Output(y.astype(v.dtype), gates, cache)


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    routing: Routing | None,
    coefficients: Coefficients,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """One more token a row, exactly as the parallel form would treat it.

    Args:
      q: [batch, heads, key_dim].
      k: [batch, heads, key_dim].
      v: [batch, heads, value_dim].
      routing: with [batch, heads, ...] arrays; None without a router.
      coefficients: with [batch, heads] arrays.
      cache: from `memory_caching`, `forward` or `decode`, with a place for each segment to come.

    Returns:
      y [batch, heads, value_dim] and the cache after the token. NaN in rows that ran out of places.
    """
    settings = cache.settings
    memory, aggregation = MEMORIES[settings.memory], AGGREGATIONS[settings.aggregation]
    overflow = cache.count > cache.capacity
    read, online = memory.step(cache.online, q, k, v, coefficients, cache.length % settings.chunk_length == 0)
    gates = None
    if routing is not None:
        dtype = cache.key_sum.dtype
        routing = jax.tree.map(lambda x: x.astype(dtype), routing)
    if aggregation.gates is not None:
        scores = online_logit = None
        if routing is not None:
            scores = router.score(routing.u[:, None], cache.pooled)
            online_logit = routing.online_logit
            if online_logit is None:
                count = (cache.key_count + 1).astype(dtype)[:, None, None]
                online_logit = jnp.sum(routing.u * (cache.key_sum + routing.keys) / count, axis=-1)
            online_logit = online_logit[:, None]
        eligible = jnp.arange(cache.capacity)[None] < cache.count[:, None]
        gates = aggregation.gates(scores, online_logit, eligible[:, None])
    y = _read(memory, q[:, None], read[:, None], gates, cache.states)[:, 0]
    if aggregation.gates is not None:
        y = jnp.where(overflow[:, None, None], jnp.nan, y)
    cache = append_token(cache, online, None if routing is None else routing.keys)
    return y.astype(v.dtype), cache


def _read(
    memory: Memory, q: jax.Array, online_read: jax.Array, gates: Gates | None, states: Weights
) -> jax.Array:
    """The weighted sum of all queried memories [B, T, H, V] (MC eq. 8)."""
    y = online_read
    if gates is not None:
        cached = jnp.broadcast_to(gates.cached, (*q.shape[:3], gates.cached.shape[-1]))
        y = gates.online[..., None] * online_read.astype(gates.online.dtype)
        y = y + memory.read(q, cached, states).astype(y.dtype)
    skip = memory.skip(q)
    return y if skip is None else y + skip.astype(y.dtype)


def _cache(
    run: MemoryRun,
    routing: Routing | None,
    pooled: jax.Array | None,
    document_ids: jax.Array | None,
    lengths: jax.Array,
    initial_state: Weights | None,
    settings: Settings,
) -> Cache:
    """The cache after tokens 0 .. lengths-1 of each row."""
    segment_length = settings.segment_length
    batch = lengths.shape[0]
    count = lengths // segment_length
    states = run.segment_states
    if AGGREGATIONS[settings.aggregation].gates is None:
        states = jax.tree.map(lambda x: x[:, :0], states)  # nothing will read them
    elif document_ids is not None:
        # Only the last document's segments may be read: they move to the front.
        last = jnp.take_along_axis(document_ids, lengths[:, None] - 1, axis=1)
        owners = segments.segment_documents(document_ids, segment_length)
        mine = (owners == last) & (jnp.arange(owners.shape[1])[None] < count[:, None])
        order = jnp.argsort(~mine, axis=1, stable=True)
        states, pooled = jax.tree.map(
            lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1),
            (states, pooled),
        )
        count = jnp.sum(mine, axis=1, dtype=jnp.int32)
    key_sum = None
    key_count = lengths % segment_length
    if routing is not None:
        positions = jnp.arange(routing.keys.shape[1])[None]
        current = (positions // segment_length == (lengths // segment_length)[:, None]) & (
            positions < lengths[:, None]
        )
        if document_ids is not None:
            current &= document_ids == last
        key_sum = jnp.einsum("bt,bthr->bhr", current.astype(routing.keys.dtype), routing.keys)
        key_count = jnp.sum(current, axis=1, dtype=jnp.int32)
    online: OnlineState = run.final
    if settings.segment_init == "independent":
        online = select_rows(lengths % segment_length == 0, restart(online, initial_state), online)
    return Cache(
        online=online,
        states=states,
        pooled=pooled,
        key_sum=key_sum,
        key_count=key_count,
        length=lengths,
        count=jnp.broadcast_to(count, (batch,)),
        initial=initial_state,
        settings=settings,
    )

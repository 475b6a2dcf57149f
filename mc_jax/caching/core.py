"""Memory Caching in its parallel form, and one token at a time (arXiv:2602.24281; docs/math.md sections 1-3).

Shapes: B batch, T tokens, S segments, N cached states, H heads, K key dim, V value dim, R router dim.
"""

import jax
import jax.numpy as jnp

from mc_jax.caching import router
from mc_jax.caching._recurrence import log_retention_of, memory_of, mixable_of
from mc_jax.caching.aggregations import Gates, Scores, Selection
from mc_jax.caching.cache import Cache, append_token, write_segment
from mc_jax.caching.reading import Routing, choose, combine, scaled
from mc_jax.caching.rows import forward
from mc_jax.caching.settings import Settings
from mc_jax.caching.storage import Storage, fetch_selected, to_place, unpack
from mc_jax.memories import Coefficients, DecodableMemory
from pallas_kernels._finite import spoilt
from pallas_kernels._state import Weights


def memory_caching(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    u: jax.Array | None = None,
    *,
    memory: str = "linear",
    aggregation: str = "gated",
    segment_length: int = 256,
    segmentation: str = "constant",
    segment_init: str = "checkpoint",
    router_keys: jax.Array | None = None,
    router_blocks: int = 1,
    top_k: int | None = None,
    online_logit: jax.Array | None = None,
    retention: jax.Array | None = None,
    momentum: jax.Array | None = None,
    step: jax.Array | None = None,
    previous_step: jax.Array | None = None,
    document_ids: jax.Array | None = None,
    initial_state: Weights | None = None,
    chunk_length: int = 64,
    selected_read: str | None = None,
    branch: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Cache]:
    """Write all tokens to a recurrent memory, cache its state at every segment's end, read them together.

    Args:
      q: queries [batch, length, heads, key_dim]; l2-normalised queries and keys are expected, not made.
      k: keys [batch, length, heads, key_dim].
      v: values [batch, length, heads, value_dim].
      u: router queries [batch, length, heads, router_dim]; None only where the aggregation has no router.
      memory: the recurrence: "linear", "swla", "delta", "dla" or "titans".
      aggregation: how the memories are read: "none", "residual", "gated", "soup", "sparse", "average"
        or "null".
      segment_length: tokens after which the state is cached; the last segment may be short.
      segmentation: "constant" (every segment is a memory), or "logarithmic" (a token's segments are grouped
        by the binary digits of their number; with "gated").
      segment_init: "checkpoint" (a segment goes on from the last state) or "independent".
      router_keys: what is pooled over a segment [batch, length, heads, router_dim]; None: k.
      router_blocks: a segment's score is the best of its `router_blocks` parts' means; 1: the paper's.
      top_k: cached memories that "sparse" and "average" read, and "null", where None is all.
      online_logit: a learned logit for the online memory, or for the null [batch, length, heads]; None: the
        score of the running mean of router keys over the segment so far.
      retention: a_t [batch, length, heads] in (0, 1]; None: 1.
      momentum: m_t [batch, length, heads] in [0, 1), of "titans"; None: 0.
      step: h_t [batch, length, heads]; None: 1.
      previous_step: p_t [batch, length, heads], of "swla"; None: 0.
      document_ids: [batch, length], int; packed documents never see each other. None: one document a row.
        For "titans", and for memories that are MLPs, documents must start at chunk boundaries; in compiled
        code, which cannot raise, the reads of one that does not are NaN.
      initial_state: [heads, key_dim, value_dim]; for an MLP ("dla", "titans") the pair
        [heads, key_dim, hidden], [heads, hidden, value_dim]; a leading batch axis is allowed; None: zeros.
      chunk_length: tokens handled together by matrix products; divides segment_length. The gradients of
        "titans", and of MLPs, are taken at the state that a chunk starts from.
      selected_read: how "sparse", and "null" with top_k, read: "dense" (all cached memories, most with a
        gate of 0) or "grouped" (tokens that read the same one together); None: what is faster for so many.
      branch: what an MLP adds to its query: "bounded" stays finite, "plain" is the paper's and may grow
        without bound; None: "bounded", or that the memory is a matrix.
      implementation: of the ops beneath; None picks the best for the platform.

    Returns:
      y [batch, length, heads, value_dim] of v's dtype (MC eq. 5), and the cache to decode on with. A token
      that is not finite makes what depends on it NaN, and changes nothing before it or in another document.

    Raises:
      ValueError: names that are not known, shapes that do not fit, a setting that would have no effect,
        documents that start within chunks where they must not.
    """
    settings = Settings(
        memory=memory,
        aggregation=aggregation,
        segment_length=segment_length,
        segmentation=segmentation,
        segment_init=segment_init,
        chunk_length=chunk_length,
        top_k=top_k,
        router_blocks=router_blocks,
        selected_read=selected_read,
        branch=branch,
        implementation=implementation,
    )
    routing = None
    if settings.about.uses_router:
        if u is None:
            raise ValueError(f"aggregation {aggregation!r} has a router; give its queries u")
        routing = Routing(u, k if router_keys is None else router_keys, online_logit)
    else:
        for name, value in (("u", u), ("router_keys", router_keys), ("online_logit", online_logit)):
            if value is not None:
                raise ValueError(f"{name} has no effect with aggregation {aggregation!r}; leave it out")
    coefficients = Coefficients(
        retention=retention, momentum=momentum, step=step, previous_step=previous_step
    )
    output = forward(
        q, k, v, routing, coefficients, settings, document_ids=document_ids, initial_state=initial_state
    )
    return output.y, output.cache


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
      y [batch, heads, value_dim] and the cache after the token.

    Raises:
      ValueError: a row ran out of places before this token. In compiled code, which cannot raise, its reads
        are NaN, and `Cache.check` tells.
    """
    if not isinstance(cache.count, jax.core.Tracer):
        cache.check()
    settings = cache.settings
    memory = memory_of(settings, coefficients, cache.online.weights)
    dtype = cache.cached.tokens.dtype
    log_retention = log_retention_of(settings, coefficients, k.shape[:2], dtype)
    scores = router_key = None
    if routing is not None:
        routing = Routing(*jax.tree.map(lambda x: x.astype(dtype), tuple(routing)))
        router_key = routing.keys
    position = cache.length % settings.segment_length
    segment = write_segment(cache.segment, position, settings, router_key, log_retention)
    if routing is not None and routing.u is not None:
        assert cache.pooled is not None
        online_logit = routing.online_logit
        if online_logit is None:
            assert segment.key_sum is not None
            mean = jnp.sum(segment.key_sum, axis=1) / jnp.sum(segment.key_count, axis=1)[:, None, None]
            online_logit = jnp.sum(routing.u * mean, axis=-1)
        scores = Scores(router.score(routing.u[:, None], cache.pooled), online_logit[:, None])
    chunk_start = cache.length % settings.chunk_length == 0
    gates = None
    if settings.about.reads_cache:
        scale = None if routing is None else routing.cache_scale
        gates = scaled(_choose_cached(cache, scores), None if scale is None else scale[:, None])
    mixable, appended = mixable_of(settings, memory), None
    if isinstance(gates, Selection) and isinstance(memory, DecodableMemory) and cache.storage.is_plain:
        place, write = cache.next_place()
        y, online, appended = memory.decode(
            cache.online,
            q,
            k,
            v,
            coefficients,
            chunk_start,
            gates.online[:, 0],
            gates.cached[:, 0],
            gates.indices[:, 0],
            cache.cached.states,
            jnp.where(write, place, -1),
        )
    elif mixable is None:
        read, online = memory.step(cache.online, q, k, v, coefficients, chunk_start)
        gates, states = _fetch(cache, gates, dtype)
        y = combine(memory, q[:, None], read[:, None], gates, states, None)[:, 0]
    else:
        gates, states = _fetch(cache, gates, dtype)
        assert gates is not None
        y, online = mixable.step_mixed(
            cache.online, q, k, v, coefficients, chunk_start, gates.online[:, 0], gates.cached[:, 0], states
        )
    if gates is not None:
        y = spoilt(y, cache.overflowed())
    if scores is not None:
        # A router that has scored what is not finite has no choice to tell.
        there = jnp.arange(cache.capacity, dtype=jnp.int32)[None] < cache.count[:, None]
        y = spoilt(y, jnp.any(there[:, None] & ~jnp.isfinite(scores.cached[:, 0]), axis=-1))
    return y.astype(v.dtype), append_token(cache, online, segment, appended)


def _choose_cached(cache: Cache, scores: Scores | None) -> Gates | Selection:
    """One token's gates, of all places of the cache or of those it selects."""
    place, there = cache.by_age()
    moves = cache.storage.when_full == "drop-oldest"
    if scores is not None and moves:
        scores = Scores(jnp.take_along_axis(scores.cached, place[:, None, None], axis=-1), scores.online)
    gates = choose(cache.settings, scores, there[:, None], cache.cached, None)
    if isinstance(gates, Selection):
        indices = jnp.take_along_axis(place[:, None, None], gates.indices, axis=-1)
        return gates._replace(indices=indices)
    if moves:
        age = jnp.argsort(place, axis=-1)
        return gates._replace(cached=jnp.take_along_axis(gates.cached, age[:, None, None], axis=-1))
    return gates


def _fetch(cache: Cache, gates: Gates | Selection | None, dtype: jnp.dtype) -> tuple[Gates | None, Weights]:
    """The cached states that a token's gates weigh, on the device: all, or just those it selects."""
    states = cache.cached.states
    if isinstance(gates, Selection):
        states = fetch_selected(states, gates.indices[:, 0], cache.storage)
        gates = Gates(gates.online, gates.cached)
    # Few enough that all are selected, if they lie in the host's memory.
    return gates, unpack(to_place(states, Storage()), dtype)

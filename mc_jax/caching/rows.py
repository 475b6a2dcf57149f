"""Memory Caching in its parallel form: all tokens of rows, or of a device's part of rows, at once.

Shapes: B batch, T tokens, S segments, H heads, V value dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.caching import continuation, router, segments
from mc_jax.caching._recurrence import log_retention_of, memory_of, mixable_of
from mc_jax.caching.aggregations import Gates, Scores, Selection
from mc_jax.caching.cache import Cache
from mc_jax.caching.continuation import Joined, follow, join, out_of_places
from mc_jax.caching.finite import Tokens, mark_begun, misaligned_documents, reach_of, without_bad
from mc_jax.caching.handover import run_in_order
from mc_jax.caching.neighbours import Neighbours
from mc_jax.caching.prefill import cache_after
from mc_jax.caching.reading import Cached, Routing, choose, combine, scaled
from mc_jax.caching.settings import Settings
from mc_jax.memories import Coefficients, Layout
from pallas_kernels._finite import marked, reads_bad, selects_bad, spoilt, states_not_finite, zeroed
from pallas_kernels._kept import keep
from pallas_kernels._state import OnlineState, Weights, state_dtype


class Output(NamedTuple):
    """What `forward` finds."""

    y: jax.Array
    """[B, T, H, V]."""
    gates: Gates | Selection | None
    """Weights of the memories in each token's read; None where only the online memory is read."""
    cache: Cache
    """With which decoding goes on after the last token."""


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
    top_k: jax.Array | None = None,
    bad: jax.Array | None = None,
) -> Output:
    """`memory_caching` for a caller that has its settings at hand.

    Args:
      q: as there, like all that is not named here.
      k: keys.
      v: values.
      routing: what the router needs; None without a router.
      coefficients: scalars per token and head.
      settings: static.
      document_ids: packed documents.
      initial_state: of the memory.
      lengths: [batch], int32: rows end there; later tokens are not written, and what they read has no
        meaning. None: all rows are full.
      top_k: a traced scalar in place of the settings' top_k, while that is annealed.
      bad: tokens that are not finite, and are given as if they were [batch, length], bool; None: they are
        looked for, which takes a pass over all arguments.
    """
    found = _read(
        q,
        k,
        v,
        routing,
        coefficients,
        settings,
        document_ids=document_ids,
        initial_state=initial_state,
        lengths=lengths,
        top_k=top_k,
        bad=bad,
        neighbours=None,
    )
    if lengths is None:
        lengths = jnp.full((q.shape[0],), q.shape[1], jnp.int32)
    pooled = found.pooled
    if pooled is not None:
        pooled = pooled._replace(mean=marked(pooled.mean.swapaxes(2, 3), found.bad_ends).swapaxes(2, 3))
    at_end = jnp.take_along_axis(found.bad, lengths[:, None, None] - 1, axis=1)[:, 0]
    cache = cache_after(
        lengths,
        online=marked(found.online, at_end),
        cached=found.cached,
        pooled=pooled,
        routing=found.routing,
        log_retention=found.log_retention,
        document_ids=found.document_ids,
        initial=initial_state,
        settings=settings,
    )
    begun = at_end & (lengths % settings.segment_length != 0)[:, None]
    return Output(found.y, found.gates, mark_begun(cache, begun))


def forward_from(
    cache: Cache,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    routing: Routing | None,
    coefficients: Coefficients,
    *,
    bad: jax.Array | None = None,
) -> Output:
    """`forward` of tokens that go on from a cache, as if they were decoded one by one; they leave the next.

    Args:
      cache: of the tokens before, which ended a segment; its settings and initial state count.
      q: whole segments of tokens [B, T, H, K], the same in all rows.
      k: keys.
      v: values.
      routing: what the router needs; None without a router.
      coefficients: scalars per token and head.
      bad: as there.

    Raises:
      ValueError: tokens that are not whole segments, or a cache whose tokens did not end one. In compiled
        code, which cannot raise, the reads of such a row are NaN.
    """
    settings, length = cache.settings, q.shape[1]
    if length % settings.segment_length:
        raise ValueError(
            f"{length} tokens are not whole segments of {settings.segment_length}; pad them, and go on from "
            "the cache no more"
        )
    begun = cache.length % settings.segment_length != 0
    if not isinstance(begun, jax.core.Tracer) and jnp.any(begun):
        raise ValueError(
            f"rows {[int(row) for row in jnp.flatnonzero(begun)]} of the cache have begun a segment of "
            f"{settings.segment_length} tokens; decode to its end one by one, and go on from there"
        )
    k = spoilt(k, begun[:, None, None])
    found = _read(
        q,
        k,
        v,
        routing,
        coefficients,
        settings,
        document_ids=None,
        initial_state=cache.initial,
        lengths=None,
        top_k=None,
        bad=bad,
        neighbours=None,
        cache=cache,
    )
    y, online = found.y, marked(found.online, found.bad[:, -1])
    if found.joined is not None:
        y = spoilt(y, out_of_places(cache, length)[..., None])
    return Output(y, found.gates, follow(cache, found.joined, online, length))


def forward_shared(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    routing: Routing | None,
    coefficients: Coefficients,
    settings: Settings,
    *,
    document_ids: jax.Array | None = None,
    initial_state: Weights | None = None,
    top_k: jax.Array | None = None,
    bad: jax.Array | None = None,
    neighbours: Neighbours | None,
) -> tuple[jax.Array, Gates | Selection | None]:
    """`forward` on one of several devices that share rows, each with a run of whole segments of them.

    Args:
      q: of this device's tokens, like all of them.
      k: keys.
      v: values.
      routing: as there.
      coefficients: scalars per token and head.
      settings: static.
      document_ids: packed documents, the same in all a row's tokens alone.
      initial_state: of the memory.
      top_k: as there.
      bad: as there.
      neighbours: the devices that share the rows; None: this one has whole rows.

    Returns:
      Reads [B, T, H, V], and the weights of the memories of whole rows in them. There is no cache.
    """
    found = _read(
        q,
        k,
        v,
        routing,
        coefficients,
        settings,
        document_ids=document_ids,
        initial_state=initial_state,
        lengths=None,
        top_k=top_k,
        bad=bad,
        neighbours=neighbours,
    )
    return found.y, found.gates


class _Found(NamedTuple):
    y: jax.Array
    gates: Gates | Selection | None
    online: OnlineState
    cached: Cached
    pooled: router.Pooled | None
    routing: Routing | None
    log_retention: jax.Array | None
    document_ids: jax.Array
    bad: jax.Array
    """Tokens after which the memory is not finite [B, T, H], bool."""
    bad_ends: jax.Array
    """Segments after which it is not [B, S, H], bool."""
    joined: Joined | None
    """The memories of the cache that the tokens go on from, and theirs."""


def _read(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    routing: Routing | None,
    coefficients: Coefficients,
    settings: Settings,
    *,
    document_ids: jax.Array | None,
    initial_state: Weights | None,
    lengths: jax.Array | None,
    top_k: jax.Array | None,
    bad: jax.Array | None,
    neighbours: Neighbours | None,
    cache: Cache | None = None,
) -> _Found:
    batch, length = q.shape[:2]
    memory = memory_of(settings, coefficients, initial_state)
    merges = settings.segmentation == "logarithmic" and settings.segment_init == "independent"
    if merges and initial_state is not None:
        raise ValueError(
            "independent segments that each start from an initial_state cannot be merged into groups; "
            "leave initial_state out, or set segment_init to 'checkpoint'"
        )
    goes_on = jnp.ones((batch, length), bool)
    if document_ids is not None and neighbours is not None:
        document_ids, goes_on = neighbours.normalize_documents(document_ids)
    elif document_ids is not None:
        document_ids = segments.normalize_documents(document_ids)
    independent = settings.segment_init == "independent"
    if bad is None:
        tokens = Tokens(q, k, v, coefficients, routing)
        (q, k, v, coefficients, routing), writes, queries = without_bad(tokens)
    else:
        writes = queries = jnp.broadcast_to(bad[..., None], q.shape[:3])
    if document_ids is not None and memory.takes_gradients:
        writes = writes | misaligned_documents(document_ids, settings.chunk_length)[..., None]
    segment_starts = settings.segment_length if independent else None
    reach = reach_of(writes, queries, document_ids, segment_starts, neighbours, goes_on)
    layout = Layout(
        segment_length=settings.segment_length,
        segment_init=settings.segment_init,
        chunk_length=settings.chunk_length,
        implementation=settings.implementation,
        initial_state=initial_state,
        document_ids=document_ids,
        lengths=lengths,
        start=None if cache is None or independent else cache.online,
    )
    if neighbours is None or independent:
        run = memory.run(q, k, v, coefficients, layout)
    else:
        run, layout = run_in_order(memory, q, k, v, coefficients, layout, goes_on, neighbours)
    dtype = state_dtype(q)
    if document_ids is None:
        document_ids = jnp.zeros((batch, length), jnp.int32)
    owners = segments.segment_documents(document_ids, settings.segment_length)
    owned = segments.owned(document_ids, settings.segment_length).astype(dtype)
    log_retention = log_retention_of(settings, coefficients, (batch, length, q.shape[2]), dtype)
    log_sum = None
    if log_retention is not None:
        log_sum = jnp.einsum("bsl,bslh->bsh", owned, segments.split(log_retention, settings.segment_length))
    bad_ends = reach.ends(settings.segment_length)
    cached = Cached(marked(run.segment_states, bad_ends), jnp.sum(owned, axis=2), log_sum)
    scores = pooled = joined = None
    if routing is not None:
        routing = Routing(*jax.tree.map(lambda x: x.astype(dtype), tuple(routing)))
    if routing is not None and routing.keys is not None:
        pooled = router.pool(routing.keys, document_ids, settings.segment_length, settings.router_blocks)
    first_segment, readable_in = 0, settings.segment_length
    if neighbours is not None and settings.about.reads_cache:
        # Which states a token may read is now known when the program runs, and not before.
        first_segment, readable_in = neighbours.index * owners.shape[1], None
        cached, pooled, owners, bad_ends = neighbours.gather((cached, pooled, owners, bad_ends))
    if cache is not None and settings.about.reads_cache:
        # A memory that is not finite is so in the cache as well: its reads and scores tell.
        joined = join(cache, cached, pooled, dtype)
        cached, pooled, readable_in = joined.cached, joined.pooled, None
        bad_ends = jnp.zeros((batch, cached.tokens.shape[1], bad_ends.shape[2]), bool)
    if routing is not None and routing.u is not None:
        assert pooled is not None
        assert routing.keys is not None
        online_logit = routing.online_logit
        if online_logit is None:
            online_logit = router.running_mean_logit(routing.u, routing.keys, settings.segment_length)
        scores = Scores(router.score(routing.u, pooled), online_logit)
    gates, states, bad_reads = None, cached.states, reach.reads
    if settings.about.reads_cache:
        if cache is None or joined is None:
            eligible = segments.eligible(document_ids, owners, settings.segment_length, first_segment)
            first = segments.first_of_document(owners)
        else:
            eligible, first = continuation.eligible(cache, joined, length), None
        chosen = choose(settings, scores, eligible, cached, top_k, first)
        gates = keep(scaled(chosen, None if routing is None else routing.cache_scale))
        if scores is not None:  # the router has scored all of them
            bad_reads = bad_reads | reads_bad(eligible[:, :, None], bad_ends)
        bad_states = states_not_finite(cached.states)
        states = zeroed(cached.states, bad_states)
        if isinstance(gates, Selection):
            bad_reads = bad_reads | selects_bad(gates.cached, gates.indices, bad_states)
        else:
            bad_reads = bad_reads | reads_bad(gates.cached, bad_states)
    mixable = mixable_of(settings, memory)
    if mixable is None:
        y = combine(memory, q, run.reads, gates, states, readable_in)
    else:
        assert isinstance(gates, Gates)
        y = mixable.run_mixed(q, k, v, coefficients, layout, *gates, states, readable_in)
    y = spoilt(y, bad_reads)
    if gates is not None:
        y = keep(y)
    return _Found(
        y.astype(v.dtype),
        gates,
        run.final,
        cached,
        pooled,
        routing,
        log_retention,
        document_ids,
        reach.online,
        bad_ends,
        joined,
    )

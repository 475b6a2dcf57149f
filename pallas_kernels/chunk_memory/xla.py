"""The chunk recurrence as matrix products: for every platform.

A loop over segments, whose inner values are computed again for the gradient; where segments are
independent, no loop: they run side by side. B batch, T tokens, S segments, H heads, K key dim, V value dim.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import Grid, Tokens, heads_first
from pallas_kernels._kept import keep
from pallas_kernels._state import (
    OnlineState,
    batch_weights,
    go_on,
    initial_online_state,
    last_token,
    select_rows,
    state_dtype,
)
from pallas_kernels.chunk_memory._delta import delta_segment
from pallas_kernels.chunk_memory._linear import linear_segment
from pallas_kernels.chunk_memory._titans import titans_segment

type Segment = Callable[[OnlineState, Tokens, jax.Array], tuple[OnlineState, jax.Array, jax.Array]]
"""From the state before, the tokens [R, N, H, C, ...] of one or more segments and the initial weights to the
state after them, their reads [R, N, H, C, V] and the weights after each segment [R, segments, H, K, V]."""

_SEGMENTS = {
    "linear": linear_segment,
    "swla": linear_segment,
    "delta": delta_segment,
    "titans": titans_segment,
}


def chunk_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rule: str,
    retention: jax.Array | None,
    momentum: jax.Array | None,
    step: jax.Array | None,
    previous_step: jax.Array | None,
    segment_length: int,
    segment_init: str,
    initial_state: jax.Array | None,
    start: OnlineState | None,
    chunk_length: int,
    document_ids: jax.Array | None,
    lengths: jax.Array | None,
) -> tuple[jax.Array, jax.Array, OnlineState]:
    """See `pallas_kernels.chunk_memory`, which checks the arguments."""

    def segment(state: OnlineState, tokens: Tokens, initial: jax.Array):
        state, reads = _SEGMENTS[rule](state, tokens, initial)
        assert isinstance(state.weights, jax.Array)
        return state, reads, state.weights[:, None]

    return run(
        q,
        k,
        v,
        rule=rule,
        coefficients=(retention, momentum, step, previous_step),
        segment=segment,
        side_by_side=1,
        segment_length=segment_length,
        independent=segment_init == "independent",
        initial_state=initial_state,
        start=start,
        chunk_length=chunk_length,
        document_ids=document_ids,
        lengths=lengths,
    )


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rule: str,
    coefficients: tuple[jax.Array | None, ...],
    segment: Segment,
    side_by_side: int,
    segment_length: int,
    independent: bool,
    initial_state: jax.Array | None,
    start: OnlineState | None = None,
    chunk_length: int,
    document_ids: jax.Array | None,
    lengths: jax.Array | None,
) -> tuple[jax.Array, jax.Array, OnlineState]:
    """Run `segment` over a row, on `side_by_side` segments at a time; on all where they are independent.

    What it makes of them is computed again for the gradient. The rest is as in `chunk_memory`.
    """
    batch, count, heads, key_dim = q.shape
    dtype = state_dtype(q)
    grid = Grid.fit(count, segment_length, chunk_length)
    segments = grid.segments
    if not independent:
        pieces = -(-segments // side_by_side)
        grid = dataclasses.replace(grid, segments=pieces, chunks=-(-segments // pieces) * grid.chunks)
    tokens = lay_out(
        grid,
        q,
        k,
        v,
        rule=rule,
        coefficients=coefficients,
        document_ids=document_ids,
        lengths=lengths,
        restarts_from_zero=initial_state is None,
    )
    tokens = jax.tree.map(functools.partial(grid.cut, independent=independent), tokens)

    if initial_state is None:
        initial_state = jnp.zeros((heads, key_dim, v.shape[-1]), dtype)
    initial = batch_weights(initial_state, batch, dtype)
    if independent:
        initial = jax.tree.map(lambda x: jnp.repeat(x, grid.segments, axis=0), initial)
    begin = initial_online_state(
        initial, momentum=rule == "titans", anchor=rule == "titans", previous=rule == "swla"
    )
    if start is not None:
        begin = go_on(start, begin)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run_piece(state: OnlineState, tokens: Tokens):
        state, reads, ends = segment(state, jax.tree.map(heads_first, tokens), initial)
        return state, (heads_first(reads).astype(q.dtype), ends)

    def piece(state: OnlineState, tokens: Tokens):
        return run_piece(state if independent else keep(state), tokens)

    final, (reads, states) = jax.lax.scan(piece, begin, tokens)
    reads = grid.join(reads, independent)[:, :count]
    # Rows first, then pieces and their segments.
    states = (states if independent else states.swapaxes(0, 1)).reshape(batch, -1, *states.shape[3:])
    reads, states = keep((reads, states[:, :segments]))
    return reads, states, _final_state(final, k, v, lengths, grid, chunk_length, independent)


def lay_out(
    grid: Grid,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rule: str,
    coefficients: tuple[jax.Array | None, ...],
    document_ids: jax.Array | None,
    lengths: jax.Array | None,
    restarts_from_zero: bool,
) -> Tokens:
    """Return the tokens [B, S*N*C, ...], padded, with padding and document starts in their coefficients."""
    batch, count = q.shape[:2]
    dtype = state_dtype(q)
    q, k, v = map(grid.pad, (q, k, v))
    retention, momentum, step, previous_step = (
        None if x is None else grid.pad(x.astype(dtype)) for x in coefficients
    )
    one = jnp.ones((1, 1, 1), dtype)

    valid = None
    if lengths is not None or grid.tokens > count:
        ends = jnp.full((batch,), count, jnp.int32) if lengths is None else lengths
        valid = (jnp.arange(grid.tokens, dtype=jnp.int32)[None] < ends[:, None])[..., None]
        step = jnp.where(valid, one if step is None else step, 0)
        retention = None if retention is None else jnp.where(valid, retention, 1)
        previous_step = None if previous_step is None else jnp.where(valid, previous_step, 0)
        momentum = jnp.where(valid, jnp.zeros_like(one) if momentum is None else momentum, 1)

    reset = restart = None
    if document_ids is not None:
        ids = grid.pad(document_ids)
        reset = jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0)])[..., None]
        reset = reset if valid is None else reset & valid
        if rule != "titans":
            # A retention of 0 cuts the products of retentions exactly there; the state that the document
            # starts from comes in as a write of its own.
            retention = one if retention is None else retention
            restart = None if restarts_from_zero else jnp.where(reset, retention, 0)
            retention = jnp.where(reset, 0, retention)
            previous_step = None if previous_step is None else jnp.where(reset, 0, previous_step)
    titans = rule == "titans"
    return Tokens(
        q=q,
        k=k,
        v=v,
        decay=retention,
        restart=restart,
        write=step,
        previous_write=previous_step,
        momentum=momentum if titans else None,
        live=valid.astype(dtype) if titans and valid is not None else None,
        document_start=reset if titans else None,
    )


def _final_state(
    state: OnlineState,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    grid: Grid,
    chunk_length: int,
    independent: bool,
) -> OnlineState:
    """Return the state after each row's last token, out of the state after the last segment or segments."""
    batch, count = k.shape[:2]
    previous = None if state.previous is None else last_token(k, v, lengths)
    lengths = jnp.full((batch,), count, jnp.int32) if lengths is None else lengths
    last = jnp.maximum(lengths - 1, 0)

    def at(x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index.reshape(batch, *[1] * (x.ndim - 1)), axis=1)[:, 0]

    if independent:
        by_segment = jax.tree.map(lambda x: x.reshape(batch, grid.segments, *x.shape[1:]), state)
        state = jax.tree.map(lambda x: at(x, last // grid.segment), by_segment)
    if state.anchor is not None:
        anchor = select_rows(lengths % chunk_length == 0, state.weights, state.anchor)
        state = dataclasses.replace(state, anchor=anchor)
    return dataclasses.replace(state, previous=previous)

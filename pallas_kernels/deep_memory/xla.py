"""The MLP memory as matrix products: for every platform.

A loop over segments, or none where they are independent: they then run side by side, as rows. Within a
segment a loop over blocks of chunks, whose inner values are computed again for the gradient, so that what is
kept is a state a block, a few numbers a token, and never a state a token.

Shapes: B batch, T tokens, S segments, N chunks of a segment, C chunk, H heads, K key dim, V value dim,
E hidden dim. R rows: the batch, or batch times segments where segments are independent.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels._branch import Branch
from pallas_kernels._chunks import Grid
from pallas_kernels._kept import keep
from pallas_kernels._state import (
    OnlineState,
    batch_weights,
    go_on,
    initial_online_state,
    select_rows,
    state_dtype,
)
from pallas_kernels.deep_memory._chunk import Tokens, run_chunks
from pallas_kernels.deep_memory._layout import lay_out

_BLOCK_CHUNKS = 8


def deep_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    objective: str,
    branch: Branch,
    retention: jax.Array | None,
    momentum: jax.Array | None,
    step: jax.Array | None,
    segment_length: int,
    segment_init: str,
    initial_state: tuple[jax.Array, jax.Array],
    start: OnlineState | None,
    chunk_length: int,
    document_ids: jax.Array | None,
    lengths: jax.Array | None,
    hidden_bias: jax.Array | None,
    hidden_gate: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], OnlineState, jax.Array | None]:
    """See `pallas_kernels.deep_memory`, which checks the arguments."""
    batch, count = q.shape[:2]
    independent = segment_init == "independent"
    grid = Grid.fit(count, segment_length, chunk_length)
    tokens = lay_out(
        grid,
        q,
        k,
        v,
        coefficients=(retention, momentum, step),
        document_ids=document_ids,
        lengths=lengths,
        hidden_bias=hidden_bias,
        hidden_gate=hidden_gate,
    )
    tokens = jax.tree.map(functools.partial(grid.cut, independent=independent), tokens)
    padded = tokens.live is not None

    weights = batch_weights(initial_state, batch, state_dtype(q))
    if independent:
        weights = jax.tree.map(lambda x: jnp.repeat(x, grid.segments, axis=0), weights)
    # Without padding the next token always begins a chunk: no anchor need be carried along.
    initial = initial_online_state(weights, momentum=objective == "l2", anchor=padded)
    begin = initial if start is None else go_on(start, initial)

    def segment(state: OnlineState, tokens: Tokens):
        run = functools.partial(run_chunks, objective=objective, branch=branch, initial=initial)
        chunks = jax.tree.map(_chunks_first, tokens)
        if chunks.restart is not None:
            chunks = dataclasses.replace(chunks, restart=chunks.restart[:, :, 0, 0])
        state, outputs = _run_in_blocks(run, state, chunks)
        return state, (jax.tree.map(_chunks_last, outputs), state.weights)

    final, ((read, hidden), states) = jax.lax.scan(segment, begin, tokens)
    read, hidden = jax.tree.map(lambda x: grid.join(x, independent)[:, :count], (read, hidden))
    if independent:
        states = jax.tree.map(lambda x: x.reshape(batch, grid.segments, *x.shape[2:]), states)
    else:
        states = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), states)
    read, states, hidden = keep((read, states, hidden))
    return read, states, _final_state(final, lengths, count, grid, chunk_length, independent), hidden


def _chunks_first(x: jax.Array) -> jax.Array:
    """Turn [R, N, C, H, ...] into [N, R, H, C, ...]."""
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _chunks_last(x: jax.Array) -> jax.Array:
    """Undo `_chunks_first`."""
    return jnp.moveaxis(x, (0, 2), (1, 3))


def _run_in_blocks(run, state: OnlineState, chunks: Tokens):
    """Run all chunks of a segment, keeping for the gradient only the states between blocks of them."""
    count = chunks.q.shape[0]
    size = next(size for size in range(min(count, _BLOCK_CHUNKS), 0, -1) if count % size == 0)
    blocks = jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), chunks)
    run = jax.checkpoint(run)
    state, outputs = jax.lax.scan(lambda state, block: run(keep(state), block), state, blocks)
    return state, jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), outputs)


def _final_state(
    state: OnlineState,
    lengths: jax.Array | None,
    count: int,
    grid: Grid,
    chunk_length: int,
    independent: bool,
) -> OnlineState:
    """Return the state after each row's last token, out of the state after the last segment or segments."""
    if lengths is None:
        batch = state.weights[0].shape[0] // (grid.segments if independent else 1)
        lengths = jnp.full((batch,), count, jnp.int32)
    if independent:
        segment = jnp.maximum(lengths - 1, 0) // grid.segment
        row = jnp.arange(lengths.shape[0], dtype=jnp.int32) * grid.segments + segment
        state = jax.tree.map(lambda x: x[row], state)
    anchor = state.weights
    if state.anchor is not None:
        anchor = select_rows(lengths % chunk_length == 0, state.weights, state.anchor)
    return dataclasses.replace(state, anchor=anchor)

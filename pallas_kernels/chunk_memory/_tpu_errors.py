"""Delta and titans by the TPU's kernels: tokens laid out in chunks, and the final state.

A chunk of titans is padded to a power of two with tokens that write nothing: a block holds whole chunks.

B batch, T tokens, S segments, H heads, K key dim, V value dim.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import Grid, heads_first
from pallas_kernels._kept import keep
from pallas_kernels._state import OnlineState, batch_weights, select_rows, state_dtype
from pallas_kernels.chunk_memory import _tpu_errors_backward, _tpu_errors_forward
from pallas_kernels.chunk_memory._titans import titans_segment
from pallas_kernels.chunk_memory._tpu_errors_block import Rule
from pallas_kernels.chunk_memory._tpu_layout import Cut, coefficient, valid_and_starts
from pallas_kernels.chunk_memory._tpu_shares import Coefficients
from pallas_kernels.chunk_memory.xla import lay_out


def write_errors(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rule: str,
    retention: jax.Array | None,
    momentum: jax.Array | None,
    step: jax.Array | None,
    segment_length: int,
    independent: bool,
    initial_state: jax.Array | None,
    chunk_length: int,
    document_ids: jax.Array | None,
    lengths: jax.Array | None,
) -> tuple[jax.Array, jax.Array, OnlineState]:
    """Delta and titans."""
    batch, tokens, heads, key_dim = q.shape
    dtype, titans = state_dtype(q), rule == "titans"
    chunk = min(chunk_length, tokens) if titans else 1
    padded = power_of_two(chunk)
    documents = document_ids is not None
    valid, starts = valid_and_starts(q, document_ids, lengths)
    if titans:
        starts = starts & (jnp.arange(tokens) % chunk == 0)[None]

    def in_chunks(x: jax.Array, fill: float) -> jax.Array:
        if padded == chunk:
            return x
        rest = ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, ((0, 0), (0, -tokens % chunk), *rest), constant_values=fill)
        x = x.reshape(batch, -1, chunk, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - chunk), *rest), constant_values=fill)
        return x.reshape(batch, -1, *x.shape[3:])

    def laid(x: jax.Array | None, neutral: float) -> jax.Array:
        return in_chunks(coefficient(q, x, neutral, valid), neutral)

    laid_out = [in_chunks(x, 0.0) for x in (q, k, v)]
    starts = in_chunks(starts, False)
    cut, back = (
        Cut.of_errors(
            laid_out[0],
            v.shape[3],
            segment_length=segment_length // chunk_length * padded if titans else segment_length,
            independent=independent,
            documents=documents,
            carried=2 if titans else 1,
            backward=backward,
        )
        for backward in (False, True)
    )
    kept = laid(retention, 1.0)
    restart = jnp.where(starts[..., None], kept, 0.0) if documents and initial_state is not None else None
    pushed = None
    if titans:
        pushed = laid(jnp.zeros_like(kept, shape=q.shape[:3]) if momentum is None else momentum, 1.0)
        pushed = jnp.where(starts[..., None], 0.0, pushed)
    marks = None
    if titans:
        live = in_chunks(valid, False).astype(dtype)
        fresh = jnp.repeat(starts[:, ::padded], padded, axis=1)[:, : starts.shape[1]].astype(dtype)
        marks = jnp.stack([live, fresh], axis=-1)
    if initial_state is None:
        initial_state = jnp.zeros((heads, key_dim, v.shape[3]), dtype)
    initial = batch_weights(initial_state, batch, dtype)
    numbers = Coefficients(laid(step, 0.0), jnp.where(starts[..., None], 0.0, kept), pushed, restart)
    reads, states = _run(
        (cut, back), Rule(momentum=titans, chunk=padded, dtype=q.dtype), laid_out, numbers, marks, initial
    )
    if padded != chunk:
        reads = reads.reshape(batch, -1, padded, *reads.shape[2:])[:, :, :chunk]
        reads = reads.reshape(batch, -1, *reads.shape[3:])[:, :tokens]

    ends = jnp.full((batch,), tokens, jnp.int32) if lengths is None else lengths
    last_segment = jnp.maximum(ends - 1, 0) // min(segment_length, tokens)
    weights, *surprise = (x[:, -1] for x in states)
    if independent and lengths is not None:
        weights, *surprise = (at_row(x, last_segment) for x in states)
    anchor = weights if titans else None
    if titans and (lengths is not None or tokens % chunk):
        grid = Grid.fit(tokens, segment_length, chunk_length)
        coefficients = (retention, momentum, step, None)
        tail = lay_out(
            grid,
            q,
            k,
            v,
            rule=rule,
            coefficients=coefficients,
            document_ids=document_ids,
            lengths=lengths,
            restarts_from_zero=False,
        )
        anchor = select_rows(
            ends % chunk_length == 0,
            weights,
            _anchor(grid, tail, states, initial, last_segment, independent),
        )
    return reads, states[0], OnlineState(weights, surprise[0] if titans else None, anchor)


def _anchor(
    grid: Grid, tokens, states, initial: jax.Array, segment: jax.Array, independent: bool
) -> jax.Array:
    """Return the memory at the start of each row's last chunk, by writing its last segment once more."""
    first = (segment == 0) | independent
    weights, momentum = (at_row(x, jnp.maximum(segment - 1, 0)) for x in states)
    before = OnlineState(weights, momentum, weights)
    before = select_rows(first, OnlineState(initial, jnp.zeros_like(initial), initial), before)

    def of_segment(x):
        x = x.reshape(x.shape[0], grid.segments, grid.chunks, grid.chunk, *x.shape[2:])
        return heads_first(at_row(x, segment))

    state, _ = titans_segment(before, jax.tree.map(of_segment, tokens), initial)
    assert isinstance(state.anchor, jax.Array)
    return state.anchor


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(cuts, rule, tokens, numbers, marks, initial):
    """Return the reads [B, tokens, H, V] and of what a state is [B, S, H, K, V], laying tokens out."""
    return _forward(cuts, rule, tokens, numbers, marks, initial)[0]


def _laid_out(cut: Cut, tokens, numbers: Coefficients, marks: jax.Array | None):
    lanes = tuple(cut.pad(x).transpose(0, 2, 3, 1) for x in tokens)

    def lay(x: jax.Array, fill: float) -> jax.Array:
        return cut.grouped(cut.pad(x, fill))

    numbers = Coefficients(
        step=lay(numbers.step, 0.0),
        retention=lay(numbers.retention, 1.0),
        momentum=None if numbers.momentum is None else lay(numbers.momentum, 1.0),
        restart=None if numbers.restart is None else lay(numbers.restart, 0.0),
    )
    return lanes, numbers, None if marks is None else cut.pad(marks).swapaxes(1, 2)


def _forward(cuts, rule, tokens, numbers, marks, initial):
    cut, _ = cuts
    out, states = _tpu_errors_forward.run(cut, rule, *_laid_out(cut, tokens, numbers, marks), initial)
    out, states = keep((out, states))
    return (cut.unpad(out.transpose(0, 3, 1, 2)), states), (tokens, numbers, marks, initial, states)


def _backward(cuts, rule, residuals, bars):
    _, cut = cuts
    tokens, numbers, marks, initial, states = residuals
    out_bar = cut.pad(bars[0]).transpose(0, 2, 3, 1)
    tokens_bar, numbers_bar, initial_bar = _tpu_errors_backward.run_bar(
        cut, rule, *_laid_out(cut, tokens, numbers, marks), initial, states, out_bar, bars[1]
    )
    tokens_bar = [cut.unpad(x.transpose(0, 3, 1, 2)) for x in tokens_bar]
    numbers_bar = jax.tree.map(lambda x: cut.unpad(cut.ungrouped(x)), numbers_bar)
    return tokens_bar, numbers_bar, None, initial_bar


_run.defvjp(_forward, _backward)


def power_of_two(count: int) -> int:
    """Return the least power of two that is not less."""
    return 1 << (count - 1).bit_length()


def at_row(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return of x [B, S, ...] what is at a row's index [B]."""
    return jnp.take_along_axis(x, index.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)[:, 0]

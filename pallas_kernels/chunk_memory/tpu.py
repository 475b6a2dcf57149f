"""The matrix memory as Pallas kernels for TPUs: linear and swla by `_tpu_linear`, delta and titans by `_tpu_errors`.

The kernels of linear write to a memory that starts empty. What an initial state adds to reads and states is a
product of its own, and swla is two linear memories with one retention, one of which writes every token late.
Products of delta and titans have operands in q's dtype too, where the other forms compute writes in float32.

Off a TPU the kernels run in interpret mode alone, under `pltpu.force_tpu_interpret_mode()`. They are not
split over devices by themselves: run them in a `jax.shard_map` over batch and heads.

B batch, T tokens, S segments, H heads, K key dim, V value dim.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._chunks import Grid, heads_first
from pallas_kernels._state import OnlineState, batch_weights, last_token, select_rows, state_dtype
from pallas_kernels.chunk_memory import _tpu_errors, _tpu_errors_backward
from pallas_kernels.chunk_memory._titans import titans_segment
from pallas_kernels.chunk_memory._tpu_errors import Rule
from pallas_kernels.chunk_memory._tpu_layout import Cut
from pallas_kernels.chunk_memory._tpu_linear import linear
from pallas_kernels.chunk_memory._tpu_shares import Coefficients
from pallas_kernels.chunk_memory.xla import lay_out

# A smaller retention is taken for this one: the logarithm of 0 would be no number.
_LEAST_RETENTION = 2.0**-64
# Tokens of a chunk of titans: those of a block at most.
_MOST_CHUNK = 128


def has_kernel(q: jax.Array, v: jax.Array, *, rule: str, segment_length: int, chunk_length: int) -> bool:
    """Whether there is a kernel for a run of queries [B, T, H, K] and values [B, T, H, V]."""
    tokens, key_dim = q.shape[1], q.shape[3]
    segment = min(segment_length, tokens)
    if rule != "titans":
        return segment <= Cut.most_tokens(key_dim, v.shape[3])
    chunk = min(chunk_length, tokens)
    padded = -(-segment // chunk) * _power_of_two(chunk)
    return chunk <= _MOST_CHUNK and padded <= Cut.most_tokens(key_dim, v.shape[3], carried=2)


def _power_of_two(count: int) -> int:
    """Return the least power of two that is not less."""
    return 1 << (count - 1).bit_length()


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
    chunk_length: int,
    document_ids: jax.Array | None,
    lengths: jax.Array | None,
) -> tuple[jax.Array, jax.Array, OnlineState]:
    """See `pallas_kernels.chunk_memory`, which checks the arguments."""
    if not has_kernel(q, v, rule=rule, segment_length=segment_length, chunk_length=chunk_length):
        raise ValueError(
            f"there is no kernel for TPUs of rule {rule!r} with segments of {segment_length} tokens in chunks "
            f"of {chunk_length}; leave implementation out, or choose 'xla'"
        )
    if rule in ("delta", "titans"):
        run = functools.partial(_write_errors, momentum=momentum, chunk_length=chunk_length)
    else:
        run = functools.partial(_write_values, previous_step=previous_step)
    return run(
        q,
        k,
        v,
        rule=rule,
        retention=retention,
        step=step,
        segment_length=segment_length,
        independent=segment_init == "independent",
        initial_state=initial_state,
        document_ids=document_ids,
        lengths=lengths,
    )


def _write_values(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rule: str,
    retention: jax.Array | None,
    step: jax.Array | None,
    previous_step: jax.Array | None,
    segment_length: int,
    independent: bool,
    initial_state: jax.Array | None,
    document_ids: jax.Array | None,
    lengths: jax.Array | None,
) -> tuple[jax.Array, jax.Array, OnlineState]:
    """Linear and swla."""
    batch, tokens, heads, _ = q.shape
    dtype = state_dtype(q)
    valid, starts = _valid_and_starts(q, document_ids, lengths)

    def coefficient(x: jax.Array | None, neutral: float, where: jax.Array) -> jax.Array:
        return _coefficient(q, x, neutral, where)

    cut, back = (
        Cut.fit(
            q,
            v.shape[3],
            segment_length=segment_length,
            independent=independent,
            documents=document_ids is not None,
            backward=backward,
        )
        for backward in (False, True)
    )
    kept = coefficient(retention, 1.0, valid)
    log_retention = jnp.log(jnp.maximum(jnp.where(starts[..., None], 1.0, kept), _LEAST_RETENTION))
    marks = starts.astype(dtype) if cut.documents else None

    def run(k: jax.Array, v: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        written = (v.astype(dtype) * step[..., None]).astype(v.dtype)
        return linear((cut, back), q, k, written, log_retention, marks)

    reads, states = run(k, v, coefficient(step, 0.0, valid))
    if rule == "swla" and previous_step is not None:
        first = jnp.arange(tokens, dtype=jnp.int32) % (cut.segment if independent else tokens) == 0
        late = coefficient(previous_step, 0.0, valid & ~starts & ~first[None])
        more_reads, more_states = run(_late(k), _late(v), late)
        reads, states = reads + more_reads, states + more_states
    if initial_state is not None:
        initial = batch_weights(initial_state, batch, dtype)
        left = _left(kept, starts, cut.segment if independent else tokens)
        read = jnp.einsum("bthk,bhkv->bthv", q, initial.astype(q.dtype), preferred_element_type=dtype)
        reads = (reads.astype(dtype) + left[..., None] * read).astype(q.dtype)
        ends = jnp.minimum(jnp.arange(1, cut.segments + 1) * cut.segment, tokens) - 1
        states = states + left[:, ends][..., None, None] * initial[:, None]
    weights = states[:, -1]
    if independent and lengths is not None:
        weights = _at(states, jnp.maximum(lengths - 1, 0) // cut.segment)
    previous = last_token(k, v, lengths) if rule == "swla" else None
    return reads, states, OnlineState(weights=weights, previous=previous)


def _late(x: jax.Array) -> jax.Array:
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))


def _left(kept: jax.Array, starts: jax.Array, period: int) -> jax.Array:
    """What is left of the initial state at each token [B, T, H]: it is whole before each start and period."""
    starts = starts | (jnp.arange(starts.shape[1]) % period == 0)[None]

    def after(one, other):
        (factor, anew), (more, anew_too) = one, other
        return jnp.where(anew_too, more, factor * more), anew | anew_too

    return jax.lax.associative_scan(after, (kept, jnp.broadcast_to(starts[..., None], kept.shape)), axis=1)[0]


def _write_errors(
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
    padded = _power_of_two(chunk)
    documents = document_ids is not None
    valid, starts = _valid_and_starts(q, document_ids, lengths)
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

    def coefficient(x: jax.Array | None, neutral: float) -> jax.Array:
        return in_chunks(_coefficient(q, x, neutral, valid), neutral)

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
    kept = coefficient(retention, 1.0)
    restart = jnp.where(starts[..., None], kept, 0.0) if documents and initial_state is not None else None
    pushed = None
    if titans:
        pushed = coefficient(jnp.zeros_like(kept, shape=q.shape[:3]) if momentum is None else momentum, 1.0)
        pushed = jnp.where(starts[..., None], 0.0, pushed)
    marks = None
    if titans:
        live = in_chunks(valid, False).astype(dtype)
        fresh = jnp.repeat(starts[:, ::padded], padded, axis=1)[:, : starts.shape[1]].astype(dtype)
        marks = jnp.stack([live, fresh], axis=-1)
    if initial_state is None:
        initial_state = jnp.zeros((heads, key_dim, v.shape[3]), dtype)
    initial = batch_weights(initial_state, batch, dtype)
    numbers = Coefficients(coefficient(step, 0.0), jnp.where(starts[..., None], 0.0, kept), pushed, restart)
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
        weights, *surprise = (_at(x, last_segment) for x in states)
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
    weights, momentum = (_at(x, jnp.maximum(segment - 1, 0)) for x in states)
    before = OnlineState(weights, momentum, weights)
    before = select_rows(first, OnlineState(initial, jnp.zeros_like(initial), initial), before)

    def of_segment(x):
        x = x.reshape(x.shape[0], grid.segments, grid.chunks, grid.chunk, *x.shape[2:])
        return heads_first(_at(x, segment))

    state, _ = titans_segment(before, jax.tree.map(of_segment, tokens), initial)
    assert isinstance(state.anchor, jax.Array)
    return state.anchor


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return of x [B, S, ...] what is at a row's index [B]."""
    return jnp.take_along_axis(x, index.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)[:, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(cuts, rule, tokens, numbers, marks, initial):
    """Return the reads [B, tokens, H, V] and of what a state is [B, S, H, K, V], laying tokens out."""
    return _forward(cuts, rule, tokens, numbers, marks, initial)[0]


def _laid_out(cut: Cut, tokens, numbers: Coefficients, marks):
    lanes = [cut.pad(x).transpose(0, 2, 3, 1) for x in tokens]
    fills = Coefficients(0.0, 1.0, 1.0, 0.0)
    numbers = Coefficients(
        *(
            None if x is None else cut.grouped(cut.pad(x, fill))
            for x, fill in zip(numbers, fills, strict=True)
        )
    )
    return tuple(lanes), numbers, None if marks is None else cut.pad(marks).swapaxes(1, 2)


def _forward(cuts, rule, tokens, numbers, marks, initial):
    cut, _ = cuts
    out, states = _tpu_errors.run(cut, rule, *_laid_out(cut, tokens, numbers, marks), initial)
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


def _valid_and_starts(q, document_ids, lengths):
    """Return which tokens are written, and which of them begin a document, [B, T] bool."""
    batch, tokens = q.shape[:2]
    valid = jnp.ones((batch, tokens), bool)
    if lengths is not None:
        valid = jnp.arange(tokens, dtype=jnp.int32)[None] < lengths[:, None]
    starts = jnp.zeros((batch, tokens), bool)
    if document_ids is not None:
        starts = jnp.pad(document_ids[:, 1:] != document_ids[:, :-1], ((0, 0), (1, 0))) & valid
    return valid, starts


def _coefficient(q, x, neutral, where):
    """Return a coefficient [B, T, H], 1 if it is None, and neutral where a mask [B, T] is not."""
    dtype = state_dtype(q)
    x = jnp.full(q.shape[:3], 1.0, dtype) if x is None else x.astype(dtype)
    return jnp.where(where[..., None], x, jnp.asarray(neutral, dtype))

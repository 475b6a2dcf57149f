"""The matrix memory as Pallas kernels for TPUs: `_tpu_linear`, and `_tpu_errors` for delta and titans.

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

from pallas_kernels._kept import keep
from pallas_kernels._state import OnlineState, batch_weights, last_token, state_dtype
from pallas_kernels.chunk_memory._tpu_errors import at_row, power_of_two, write_errors
from pallas_kernels.chunk_memory._tpu_layout import Cut, coefficient, valid_and_starts
from pallas_kernels.chunk_memory._tpu_linear import linear

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
    padded = -(-segment // chunk) * power_of_two(chunk)
    return chunk <= _MOST_CHUNK and padded <= Cut.most_tokens(key_dim, v.shape[3], carried=2)


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
            f"there is no kernel for TPUs of rule {rule!r} with segments of {segment_length} tokens "
            f"in chunks of {chunk_length}; leave implementation out, or choose 'xla'"
        )
    if rule in ("delta", "titans"):
        run = functools.partial(write_errors, momentum=momentum, chunk_length=chunk_length)
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
    batch, tokens = q.shape[:2]
    dtype = state_dtype(q)
    valid, starts = valid_and_starts(q, document_ids, lengths)
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
    kept = coefficient(q, retention, 1.0, valid)
    log_retention = jnp.log(jnp.maximum(jnp.where(starts[..., None], 1.0, kept), _LEAST_RETENTION))
    marks = starts.astype(dtype) if cut.documents else None

    def run(k: jax.Array, v: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        written = (v.astype(dtype) * step[..., None]).astype(v.dtype)
        return linear((cut, back), q, k, written, log_retention, marks)

    reads, states = run(k, v, coefficient(q, step, 0.0, valid))
    if rule == "swla" and previous_step is not None:
        first = jnp.arange(tokens, dtype=jnp.int32) % (cut.segment if independent else tokens) == 0
        late = coefficient(q, previous_step, 0.0, valid & ~starts & ~first[None])
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
        weights = at_row(states, jnp.maximum(lengths - 1, 0) // cut.segment)
    previous = last_token(k, v, lengths) if rule == "swla" else None
    return keep(reads), states, OnlineState(weights=weights, previous=previous)


def _late(x: jax.Array) -> jax.Array:
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))


def _left(kept: jax.Array, starts: jax.Array, period: int) -> jax.Array:
    """What is left of the initial state at each token [B, T, H]: it is whole before each start and period."""
    starts = starts | (jnp.arange(starts.shape[1]) % period == 0)[None]

    def after(one, other):
        (factor, anew), (more, anew_too) = one, other
        return jnp.where(anew_too, more, factor * more), anew | anew_too

    return jax.lax.associative_scan(after, (kept, jnp.broadcast_to(starts[..., None], kept.shape)), axis=1)[0]

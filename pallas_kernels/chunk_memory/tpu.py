"""The linear memory and swla as Pallas kernels for TPUs: `_tpu_linear`.

The kernels write to a memory that starts empty. What an initial state adds to reads and states is a product
of its own, and swla is two linear memories with one retention, one of which writes every token late.

Off a TPU the kernels run in interpret mode alone, under `pltpu.force_tpu_interpret_mode()`. They are not
split over devices by themselves: run them in a `jax.shard_map` over batch and heads.

B batch, T tokens, S segments, H heads, K key dim, V value dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._state import OnlineState, batch_weights, last_token, state_dtype
from pallas_kernels.chunk_memory._tpu_layout import Cut
from pallas_kernels.chunk_memory._tpu_linear import linear

# A smaller retention is taken for this one: the logarithm of 0 would be no number.
_LEAST_RETENTION = 2.0**-64


def has_kernel(q: jax.Array, v: jax.Array, *, rule: str, segment_length: int) -> bool:
    """Whether there is a kernel for a run of queries [B, T, H, K] and values [B, T, H, V]."""
    most = Cut.most_tokens(q.shape[3], v.shape[3])
    return rule in ("linear", "swla") and min(segment_length, q.shape[1]) <= most


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
    """See `pallas_kernels.chunk_memory`, which checks the arguments; `chunk_length` has no influence here."""
    assert momentum is None
    if not has_kernel(q, v, rule=rule, segment_length=segment_length):
        raise ValueError(
            f"there is no kernel for TPUs of rule {rule!r} with segments of {segment_length} tokens; "
            "leave implementation out, or choose 'xla'"
        )
    batch, tokens, heads, _ = q.shape
    dtype = state_dtype(q)
    independent = segment_init == "independent"
    valid = jnp.ones((batch, tokens), bool)
    if lengths is not None:
        valid = jnp.arange(tokens, dtype=jnp.int32)[None] < lengths[:, None]
    starts = jnp.zeros((batch, tokens), bool)
    if document_ids is not None:
        starts = jnp.pad(document_ids[:, 1:] != document_ids[:, :-1], ((0, 0), (1, 0))) & valid

    def coefficient(x: jax.Array | None, neutral: float, where: jax.Array) -> jax.Array:
        x = jnp.full((batch, tokens, heads), 1.0, dtype) if x is None else x.astype(dtype)
        return jnp.where(where[..., None], x, jnp.asarray(neutral, dtype))

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
        last = jnp.maximum(lengths - 1, 0) // cut.segment
        weights = jnp.take_along_axis(states, last[:, None, None, None, None], axis=1)[:, 0]
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

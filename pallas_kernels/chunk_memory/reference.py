"""The chunk recurrence, token by token: the plain meaning that the other implementations are held to.

B batch, T tokens, S segments, H heads, K key dim, V value dim.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._state import (
    OnlineState,
    batch_weights,
    go_on,
    initial_online_state,
    select_rows,
    state_dtype,
)
from pallas_kernels._step import memory_step


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
    batch, tokens, heads, key_dim = q.shape
    dtype = state_dtype(q)
    if initial_state is None:
        initial_state = jnp.zeros((heads, key_dim, v.shape[-1]), dtype)
    initial = initial_online_state(
        batch_weights(initial_state, batch, dtype),
        momentum=rule == "titans",
        anchor=rule == "titans",
        previous=rule == "swla",
    )
    begin = initial if start is None else go_on(start, initial)
    if lengths is None:
        lengths = jnp.full((batch,), tokens, jnp.int32)

    segments = -(-tokens // segment_length)
    position = jnp.arange(segments * segment_length, dtype=jnp.int32)
    valid = position[None] < lengths[:, None]
    chunk_start = position % chunk_length == 0
    reset = jnp.zeros_like(valid)
    if document_ids is not None:
        changed = document_ids[:, 1:] != document_ids[:, :-1]
        reset = reset.at[:, 1:tokens].set(changed) & valid
        if rule == "titans":
            reset = reset & chunk_start[None]
    if segment_init == "independent":
        reset = reset | (position % segment_length == 0)[None]

    def token(carry, inputs):
        state, final = carry
        (q, k, v, coefficients), valid, reset, chunk_start = inputs
        state = select_rows(reset, initial, state)
        read, written = memory_step(
            state, q, k, v, rule=rule, chunk_start=jnp.broadcast_to(chunk_start, valid.shape), **coefficients
        )
        state = select_rows(valid, written, state)
        return (state, select_rows(valid, state, final)), read

    def segment(carry, inputs):
        carry, reads = jax.lax.scan(token, carry, inputs)
        weights = carry[0].weights
        assert isinstance(weights, jax.Array)
        return carry, (reads, weights)

    cut = functools.partial(_cut, segments=segments)
    coefficients = {
        "retention": retention,
        "momentum": momentum,
        "step": step,
        "previous_step": previous_step,
    }
    per_token = jax.tree.map(lambda x: _pad(x, segments * segment_length), (q, k, v, coefficients))
    by_segment = jax.tree.map(cut, (per_token, valid, reset))
    inputs = (*by_segment, chunk_start.reshape(segments, segment_length))
    (_, final), (reads, states) = jax.lax.scan(segment, (begin, begin), inputs)
    if final.anchor is not None:
        anchor = select_rows(lengths % chunk_length == 0, final.weights, final.anchor)
        final = OnlineState(weights=final.weights, momentum=final.momentum, anchor=anchor)
    reads = jnp.moveaxis(reads.reshape(segments * segment_length, *reads.shape[2:]), 0, 1)
    return reads[:, :tokens], jnp.moveaxis(states, 0, 1), final


def _pad(x: jax.Array, tokens: int) -> jax.Array:
    """Append zeros to axis 1 of [B, T, ...] up to `tokens`."""
    return jnp.pad(x, [(0, 0), (0, tokens - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _cut(x: jax.Array, segments: int) -> jax.Array:
    """Turn [B, S * L, ...] into [S, L, B, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], segments, -1, *x.shape[2:]), 0, 2)

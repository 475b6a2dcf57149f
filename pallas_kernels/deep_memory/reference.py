"""The MLP memory token by token: the plain meaning that the other implementations are held to.

The gradient is `jax.grad` of the loss itself. B batch, T tokens, S segments, H heads, K key dim, V value dim,
E hidden dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._branch import Branch
from pallas_kernels._state import (
    OnlineState,
    batch_weights,
    go_on,
    initial_online_state,
    select_rows,
    state_dtype,
)


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
    batch, count, heads = q.shape[:3]
    dtype = state_dtype(q)
    initial = initial_online_state(
        batch_weights(initial_state, batch, dtype), momentum=objective == "l2", anchor=True
    )
    begin = initial if start is None else go_on(start, initial)
    soup = hidden_bias is not None or hidden_gate is not None
    hidden_dim = initial_state[0].shape[-1]

    def fill(x: jax.Array | None, neutral: float, *dims: int) -> jax.Array:
        return jnp.full((batch, count, heads, *dims), neutral, dtype) if x is None else x.astype(dtype)

    segments = -(-count // segment_length)
    position = jnp.arange(segments * segment_length, dtype=jnp.int32)
    ends = jnp.full((batch,), count, jnp.int32) if lengths is None else lengths
    live = position[None] < ends[:, None]
    chunk_start = position % chunk_length == 0
    restart = jnp.zeros_like(live)
    if document_ids is not None:
        changed = document_ids[:, 1:] != document_ids[:, :-1]
        restart = restart.at[:, 1:count].set(changed) & live & chunk_start[None]
    if segment_init == "independent":
        restart = restart | (position % segment_length == 0)[None]

    def token(carry, inputs):
        state, final = carry
        q, k, v, retention, momentum, step, bias, gate, live, restart, chunk_start = inputs
        state = select_rows(restart, initial, state)
        anchor = jax.tree.map(lambda new, old: jnp.where(chunk_start, new, old), state.weights, state.anchor)
        gradient = _gradient(objective, branch)(anchor, k, v)
        write = jax.tree.map(lambda g: -_per_head(step) * g, gradient)
        surprise = None
        if objective == "l2":
            surprise = jax.tree.map(lambda s, w: _per_head(momentum) * s + w, state.momentum, write)
            write = surprise
        weights = jax.tree.map(lambda m, w: _per_head(retention) * m + w, state.weights, write)
        written = OnlineState(weights=weights, momentum=surprise, anchor=anchor)
        state = select_rows(live, written, state)
        hidden = jax.nn.gelu(gate[..., None] * _product(q, state.weights[0]) + bias, approximate=True)
        read = gate[..., None] * _product(hidden, state.weights[1])
        if not soup:
            read = branch.of(read)
        return (state, select_rows(live, state, final)), (read, hidden if soup else None)

    def segment(carry, inputs):
        carry, outputs = jax.lax.scan(token, carry, inputs)
        return carry, (outputs, carry[0].weights)

    def cut(x: jax.Array) -> jax.Array:
        """Turn [B, T or S * L, ...] into [S, L, B, ...]."""
        padding = [(0, 0), (0, position.size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(batch, segments, segment_length, *x.shape[2:])
        return jnp.moveaxis(x, 0, 2)

    inputs = (
        *(x.astype(dtype) for x in (q, k, v)),
        fill(retention, 1),
        fill(momentum, 0),
        fill(step, 1),
        fill(hidden_bias, 0, hidden_dim),
        fill(hidden_gate, 1),
        live,
        restart,
    )
    inputs = (*map(cut, inputs), chunk_start.reshape(segments, segment_length))
    (_, final), ((read, hidden), states) = jax.lax.scan(segment, (begin, begin), inputs)
    states = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), states)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(position.size, *x.shape[2:]), 0, 1)
        return x[:, :count].astype(q.dtype)

    anchor = select_rows(ends % chunk_length == 0, final.weights, final.anchor)
    final = OnlineState(weights=final.weights, momentum=final.momentum, anchor=anchor)
    return join(read), states, final, None if hidden is None else join(hidden)


def _gradient(objective: str, branch: Branch):
    """Return the gradient of the loss of one token w.r.t. the weights, over batch and heads."""

    def loss(weights, k, v):
        w_in, w_out = weights
        hidden = jax.nn.gelu(jnp.matmul(k, w_in, precision="highest"), approximate=True)
        output = k + branch.of(jnp.matmul(hidden, w_out, precision="highest"))
        return -jnp.sum(output * v) if objective == "dot" else 0.5 * jnp.sum((output - v) ** 2)

    return jax.vmap(jax.vmap(jax.grad(loss)))


def _product(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("bhk,bhke->bhe", x, weights, precision="highest")


def _per_head(x: jax.Array) -> jax.Array:
    """Turn [B, H] into [B, H, 1, 1]."""
    return x[..., None, None]

"""The dense read as one matrix product a state, so that nothing of size tokens x states x dim is built.

Shapes: B batch, T tokens, H heads, K key dim, V value dim, E hidden dim, N states.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._query import gelu, matmul, query
from pallas_kernels._state import Weights, state_dtype

# Two states a step, so that the passes over the sum of reads are half as many: on a CPU the best of 1, 2, 4.
_UNROLL = 2
# Pieces that a causal read is cut into: 4 skip three eighths of the reads; more skip little more.
_PIECES = 4


def gated_state_read(
    q: jax.Array, gates: jax.Array, states: Weights, *, segment_length: int | None
) -> jax.Array:
    """See `pallas_kernels.state_read.gated_state_read`; shapes as there."""
    if q.shape[1] == 1:
        return _read_token(q, gates, states)
    q_BHTK = q.swapaxes(1, 2)
    gates_NBHT = gates.transpose(3, 0, 2, 1)
    states = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), states)
    pieces = []
    for start, stop, readable in _pieces(q.shape[1], gates.shape[3], segment_length):
        readable_states = jax.tree.map(lambda leaf: leaf[:readable], states)  # noqa: B023
        pieces.append(_read(q_BHTK[:, :, start:stop], gates_NBHT[:readable, ..., start:stop], readable_states))
    return jnp.concatenate(pieces, axis=2).swapaxes(1, 2).astype(q.dtype)


def _pieces(tokens: int, states: int, segment_length: int | None) -> list[tuple[int, int, int]]:
    """(start, stop, states that may be read) of stretches of tokens."""
    if segment_length is None:
        return [(0, tokens, states)]
    segments = -(-tokens // segment_length)
    length = -(-segments // _PIECES) * segment_length
    pieces = [(start, min(start + length, tokens)) for start in range(0, tokens, length)]
    return [(start, stop, min((stop - 1) // segment_length, states)) for start, stop in pieces]


def _read_token(q, gates, states):
    # One token a row, in decoding: no loop, and states stay where they are.
    reads_BNHV = query(q[:, :, :, None], states)[:, :, :, 0]
    gates_BNH = gates[:, 0].swapaxes(1, 2).astype(reads_BNHV.dtype)
    return jnp.sum(gates_BNH[..., None] * reads_BNHV, axis=1, keepdims=True).astype(q.dtype)


@jax.custom_vjp
def _read(q_BHTK: jax.Array, gates_NBHT: jax.Array, states: Weights) -> jax.Array:
    """States [N, B, H, ...]; the result [B, H, T, V] is float32 at least."""
    return _forward(q_BHTK, gates_NBHT, states)[0]


def _forward(q, gates, states):
    dtype = state_dtype(q)

    def read(out, state):
        gate, weights = state
        return out + gate[..., None].astype(dtype) * query(q, weights), None

    zero = jnp.zeros((*q.shape[:3], jax.tree.leaves(states)[-1].shape[-1]), dtype)
    out, _ = jax.lax.scan(read, zero, (gates, states), unroll=_UNROLL)
    return out, (q, gates, states)


def _backward(residuals, out_bar):
    q, gates, states = residuals
    out_bar = out_bar.astype(q.dtype)
    read_bar = _mlp_read_bar if isinstance(states, tuple) else _matrix_read_bar

    def backward(q_bar, state):
        gate, weights = state
        more, gate_bar, weights_bar = read_bar(q, gate[..., None].astype(q_bar.dtype), weights, out_bar)
        weights_bar = jax.tree.map(lambda bar, leaf: bar.astype(leaf.dtype), weights_bar, weights)
        return q_bar + more, (gate_bar.astype(gate.dtype), weights_bar)

    zero = jnp.zeros(q.shape, state_dtype(q))
    q_bar, (gates_bar, states_bar) = jax.lax.scan(backward, zero, (gates, states), unroll=_UNROLL)
    return q_bar.astype(q.dtype), gates_bar, states_bar


def _matrix_read_bar(q, gate, weights, out_bar):
    # With P = dO M^T: dq = g P, dg = <P, q>, dM = (g q)^T dO; no read is made again.
    p = matmul(out_bar, weights.swapaxes(2, 3))
    wide_q = q.astype(p.dtype)
    weights_bar = matmul((gate * wide_q).astype(q.dtype).swapaxes(2, 3), out_bar)
    return gate * p, jnp.sum(p * wide_q, axis=-1), weights_bar


def _mlp_read_bar(q, gate, weights, out_bar):
    # The same with the hidden layer h, made again here, in the place of q; then through the first layer.
    w_in, w_out = weights
    hidden, gelu_vjp = jax.vjp(gelu, matmul(q, w_in))
    p = matmul(out_bar, w_out.swapaxes(2, 3))
    w_out_bar = matmul((gate * hidden).astype(q.dtype).swapaxes(2, 3), out_bar)
    (inner_bar,) = gelu_vjp(gate * p)
    inner_bar = inner_bar.astype(q.dtype)
    q_bar = matmul(inner_bar, w_in.swapaxes(2, 3))
    return q_bar, jnp.sum(p * hidden, axis=-1), (matmul(q.swapaxes(2, 3), inner_bar), w_out_bar)


_read.defvjp(_forward, _backward)

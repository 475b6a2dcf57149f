"""The dense read as one matrix product a state, so that nothing of size tokens x states x dim is built.

The tokens are cut into pieces, the states into groups, and one loop goes over all pairs of the two in which
something is read: a piece stays in the processor's cache, and what a causal read cannot see costs nothing.
On a GPU, where every product is a kernel to start, a group is larger and read by one product.

Shapes: B batch, T tokens, P pieces, C tokens of a piece, H heads, K key dim, V value dim, E hidden dim,
N states, S groups of states, G states of a group.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._branch import Branch
from pallas_kernels._platform import platform
from pallas_kernels._query import gelu, matmul, query
from pallas_kernels._state import Weights, state_dtype

# Measured on a CPU: 4 or 16 pieces, 1, 2 or 8 states are slower. A group's reads are summed in one pass.
_PIECES = 8
_GROUP = 4
# What a group's reads take is that many times a piece of queries. Not measured.
_GPU_GROUP = 16


def gated_state_read(
    q: jax.Array, gates: jax.Array, states: Weights, *, branch: Branch | None, segment_length: int | None
) -> jax.Array:
    """See `pallas_kernels.state_read.gated_state_read`; shapes as there."""
    batch, tokens, heads, _ = q.shape
    count = gates.shape[3]
    value_dim = jax.tree.leaves(states)[-1].shape[-1]
    gates = gates.astype(state_dtype(q))
    if tokens == 0 or count == 0:
        return jnp.zeros((batch, tokens, heads, value_dim), q.dtype)
    if tokens == 1:
        return _read_token(q, gates, states, branch)
    unit = segment_length or 1
    length = -(-tokens // (unit * _PIECES)) * unit
    at_once = platform() == "gpu"
    group = min(_GPU_GROUP if at_once else _GROUP, count)
    more_tokens, more_states = (0, -tokens % length), (0, -count % group)

    def pieces(x_BTHD):
        x = jnp.pad(x_BTHD, ((0, 0), more_tokens, (0, 0), (0, 0)))
        return x.reshape(batch, -1, length, *x.shape[2:]).transpose(1, 0, 3, 2, 4)

    def groups(x_BNHKV):
        x = jnp.pad(x_BNHKV, ((0, 0), more_states, (0, 0), (0, 0), (0, 0))).swapaxes(0, 1)
        return x.reshape(-1, group, *x.shape[1:])

    gates_PBHCN = pieces(jnp.pad(gates, ((0, 0), (0, 0), (0, 0), more_states)))
    gates_PSGBHC = jnp.moveaxis(gates_PBHCN.reshape(*gates_PBHCN.shape[:4], -1, group), (4, 5), (1, 2))
    pairs = _pairs(tokens, count, length, segment_length, group)
    how = _How(branch, at_once)
    out_PBHCV = _read(pieces(q), gates_PSGBHC, jax.tree.map(groups, states), pairs, how)
    out = out_PBHCV.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, value_dim)
    return out[:, :tokens].astype(q.dtype)


def _pairs(tokens: int, states: int, length: int, segment_length: int | None, group: int) -> np.ndarray:
    """The (piece, group of states) in which something is read, [pairs, 2]."""
    pairs = []
    for piece, start in enumerate(range(0, tokens, length)):
        last = min(start + length, tokens) - 1
        readable = states if segment_length is None else min(states, last // segment_length)
        pairs += [(piece, first // group) for first in range(0, readable, group)]
    return np.array(pairs, np.int32).reshape(-1, 2)


def _read_token(q, gates, states, branch):
    # One token a row, in decoding: no loop, and states stay where they are.
    reads_BNHV = query(q[:, :, :, None], states, branch)[:, :, :, 0]
    gates_BNH = gates[:, 0].swapaxes(1, 2)
    weighed_BNHV = jnp.where(gates_BNH[..., None] != 0, gates_BNH[..., None] * reads_BNHV, 0)
    return jnp.sum(weighed_BNHV, axis=1, keepdims=True).astype(q.dtype)


class _How(NamedTuple):
    branch: Branch | None
    """None of matrices."""
    at_once: bool
    """A group's states are read at once, not one by one."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _read(
    q_PBHCK: jax.Array, gates_PSGBHC: jax.Array, states: Weights, pairs: np.ndarray, how: _How
) -> jax.Array:
    """States [S, G, B, H, ...], read by groups; [P, B, H, C, V] in float32 at least."""
    return _forward(q_PBHCK, gates_PSGBHC, states, pairs, how)[0]


def _forward(q, gates, states, pairs, how):
    def read(out, pair):
        piece, group = pair
        q_piece, out_piece = q[piece], out[piece]
        if how.at_once:
            weights = jax.tree.map(lambda leaf: leaf[group], states)
            out_piece += _group_read(q_piece, gates[piece, group], weights, how.branch)
        else:
            for gate, weights in _members(gates[piece, group], states, group):
                out_piece += gate * query(q_piece, weights, how.branch)
        return out.at[piece].set(out_piece), None

    value_dim = jax.tree.leaves(states)[-1].shape[-1]
    zero = jnp.zeros((*q.shape[:-1], value_dim), gates.dtype)
    out, _ = jax.lax.scan(read, zero, (pairs[:, 0], pairs[:, 1]))
    return out, (q, gates, states, pairs)


def _group_read(q_BHCK, gates_GBHC, weights, branch):
    if branch is not None and branch.is_bounded:
        # A state's read is bounded before it is weighed.
        return jnp.sum(gates_GBHC[..., None] * query(q_BHCK[None], weights, branch), axis=0)
    # [g_1 q | g_2 q | ...] [M_1; M_2; ...]: states are joined along the keys; of MLPs, hidden layers.
    dtype = gates_GBHC.dtype
    inner = q_BHCK[None].astype(dtype)
    if isinstance(weights, tuple):
        inner, weights = gelu(matmul(q_BHCK[None], weights[0])), weights[1]
    gated = (gates_GBHC[..., None] * inner).astype(q_BHCK.dtype)
    return jnp.einsum("gbhck,gbhkv->bhcv", gated, weights.astype(gated.dtype), preferred_element_type=dtype)


def _backward(how, residuals, out_bar):
    q, gates, states, pairs = residuals
    out_bar = out_bar.astype(q.dtype)
    read_bar = _matrix_read_bar
    if how.branch is not None:
        read_bar = functools.partial(_mlp_read_bar, how.branch)

    def backward(bars, pair):
        q_bar, gates_bar, states_bar = bars
        piece, group = pair
        q_piece, out_bar_piece, q_bar_piece = q[piece], out_bar[piece], q_bar[piece]
        if how.at_once:
            gate, weights = gates[piece, group][..., None], jax.tree.map(lambda leaf: leaf[group], states)
            every = jax.vmap(read_bar, in_axes=(None, 0, 0, None))
            more, gate_bar, weights_bar = every(q_piece, gate, weights, out_bar_piece)
            q_bar_piece += more.sum(axis=0)
        else:
            members = []
            for gate, weights in _members(gates[piece, group], states, group):
                more, *member = read_bar(q_piece, gate, weights, out_bar_piece)
                q_bar_piece += more
                members.append(member)
            gate_bar, weights_bar = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
        return (
            q_bar.at[piece].set(q_bar_piece),
            gates_bar.at[piece, group].set(gate_bar),
            jax.tree.map(lambda bar, more: bar.at[group].add(more), states_bar, weights_bar),
        ), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, gates.dtype), (q, gates, states))
    (q_bar, gates_bar, states_bar), _ = jax.lax.scan(backward, zeros, (pairs[:, 0], pairs[:, 1]))
    states_bar = jax.tree.map(lambda bar, leaf: bar.astype(leaf.dtype), states_bar, states)
    return q_bar.astype(q.dtype), gates_bar, states_bar, None


def _members(gates_GBHC, states, group):
    for n, gate_BHC in enumerate(gates_GBHC):
        yield gate_BHC[..., None], jax.tree.map(lambda leaf: leaf[group, n], states)  # noqa: B023


def _matrix_read_bar(q, gate, weights, out_bar):
    # With P = dO M^T: dq = g P, dg = <P, q>, dM = (g q)^T dO; no read is made again.
    p = matmul(out_bar, weights.swapaxes(2, 3))
    wide_q = q.astype(p.dtype)
    weights_bar = matmul((gate * wide_q).astype(q.dtype).swapaxes(2, 3), out_bar)
    return gate * p, jnp.sum(p * wide_q, axis=-1), weights_bar


def _mlp_read_bar(branch, q, gate, weights, out_bar):
    # The same with the hidden layer h, made again here, in the place of q; then through the first layer.
    # A bounded read is made again too: its length is in all gradients.
    w_in, w_out = weights
    hidden, gelu_vjp = jax.vjp(gelu, matmul(q, w_in))
    if branch.is_bounded:
        low = hidden.astype(q.dtype)
        z = matmul(low, w_out)
        gate_bar, z_bar = branch.bars(z, out_bar.astype(z.dtype))
        gate_bar, z_bar = gate_bar[..., 0], (gate * z_bar).astype(q.dtype)
        hidden_bar = matmul(z_bar, w_out.swapaxes(2, 3))
        w_out_bar = matmul(low.swapaxes(2, 3), z_bar)
    else:
        p = matmul(out_bar, w_out.swapaxes(2, 3))
        gate_bar = jnp.sum(p * hidden, axis=-1)
        w_out_bar = matmul((gate * hidden).astype(q.dtype).swapaxes(2, 3), out_bar)
        hidden_bar = gate * p
    (inner_bar,) = gelu_vjp(hidden_bar)
    inner_bar = inner_bar.astype(q.dtype)
    w_in_bar = matmul(q.swapaxes(2, 3), inner_bar)
    return matmul(inner_bar, w_in.swapaxes(2, 3)), gate_bar, (w_in_bar, w_out_bar)


_read.defvjp(_forward, _backward)

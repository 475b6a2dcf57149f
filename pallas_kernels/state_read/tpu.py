"""The dense read as Pallas kernels for TPUs: matrices in `_tpu_matrix`, MLPs in `_tpu_mlp`.

Off a TPU the kernels run in interpret mode alone, under `pltpu.force_tpu_interpret_mode()`. They are not
split over devices by themselves: run them in a `jax.shard_map` over batch and heads.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._branch import Branch
from pallas_kernels._state import Weights, state_dtype
from pallas_kernels.state_read import _tpu_matrix, _tpu_mlp


def gated_state_read(
    q: jax.Array, gates: jax.Array, states: Weights, *, branch: Branch | None, segment_length: int | None
) -> jax.Array:
    """See `pallas_kernels.state_read.gated_state_read`; shapes as there."""
    gates = gates.astype(state_dtype(q))
    if q.size == 0 or gates.size == 0:
        return jnp.zeros((*q.shape[:-1], jax.tree.leaves(states)[-1].shape[-1]), q.dtype)
    return _read(q, gates, states, branch, segment_length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _read(q, gates, states, branch, segment_length):
    if isinstance(states, tuple):
        return _tpu_mlp.read(q, gates, states, branch, segment_length)
    return _tpu_matrix.read(q, gates, states, segment_length)


def _forward(q, gates, states, branch, segment_length):
    return _read(q, gates, states, branch, segment_length), (q, gates, states)


def _backward(branch, segment_length, residuals, out_bar):
    q, gates, states = residuals
    if isinstance(states, tuple):
        bars = _tpu_mlp.read_bar(q, gates, states, out_bar, branch, segment_length)
    else:
        bars = _tpu_matrix.read_bar(q, gates, states, out_bar, segment_length)
    q_bar, gates_bar, states_bar = bars
    states_bar = jax.tree.map(lambda bar, leaf: bar.astype(leaf.dtype), states_bar, states)
    return q_bar, gates_bar, states_bar


_read.defvjp(_forward, _backward)

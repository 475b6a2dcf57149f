"""The sparse read of matrix states as Pallas kernels for TPUs, in `_tpu_matrix`; MLPs' is XLA's.

Off a TPU the kernels run in interpret mode alone, under `pltpu.force_tpu_interpret_mode()`. They are not
split over devices by themselves: run them in a `jax.shard_map` over batch and heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._platform import vmem_bytes
from pallas_kernels._state import Weights
from pallas_kernels.routed_read import _tpu_matrix, _tpu_pairs

# States that are copied together.
_GROUP = 4


def fits(q: jax.Array, choices: int, states: Weights) -> bool:
    """Whether there is a kernel for these arguments: of matrices, and not of too many."""
    return not isinstance(states, tuple) and plan_of(q, choices, states) is not None


def routed_state_read(q: jax.Array, gates: jax.Array, indices: jax.Array, states: Weights) -> jax.Array:
    """See `pallas_kernels.routed_read.routed_state_read`; shapes as there."""
    if isinstance(states, tuple):
        raise ValueError("states that are MLPs have no kernel for TPUs; leave implementation out")
    plan = plan_of(q, indices.shape[3], states)
    if plan is None:
        raise ValueError(
            f"{states.shape[1]} states of {states.shape[3:]} do not fit a TPU's kernel; "
            "leave implementation out"
        )
    if q.size == 0 or indices.size == 0:
        return jnp.zeros((*q.shape[:-1], states.shape[-1]), q.dtype)
    return _read(q, gates.astype(jnp.float32), _tpu_pairs.lists(indices, plan), states, plan)


def plan_of(q: jax.Array, choices: int, states: jax.Array) -> _tpu_pairs.Plan | None:
    """Return how the kernel cuts a read of matrices on the chip at hand; None where there is no kernel."""
    return _tpu_pairs.fit(q, choices, states, group=_GROUP, vmem=vmem_bytes())


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _read(q, gates, lists, states, plan):
    return _tpu_matrix.read(q, gates, lists, states, plan, vmem_bytes())


def _forward(q, gates, lists, states, plan):
    return _read(q, gates, lists, states, plan), (q, gates, lists, states)


def _backward(plan, residuals, out_bar):
    q, gates, lists, states = residuals
    q_bar, gates_bar, states_bar = _tpu_matrix.read_bar(q, gates, lists, states, out_bar, plan, vmem_bytes())
    return q_bar, gates_bar, np.zeros(lists.shape, jax.dtypes.float0), states_bar.astype(states.dtype)


_read.defvjp(_forward, _backward)

"""The sparse read of matrix states as Pallas kernels for TPUs; MLPs' is XLA's.

There are two kernels. `_tpu_union` lets a block of tokens read all that one of them has chosen, which is
quick where neighbours agree; `_tpu_pairs` sorts tokens by state, and takes as long whatever they choose.
Which of them runs is decided while the program runs, by how many states a block reads.

Off a TPU the kernels run in interpret mode alone, under `pltpu.force_tpu_interpret_mode()`. They are not
split over devices by themselves: run them in a `jax.shard_map` over batch and heads.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._branch import Branch
from pallas_kernels._expected import SELDOM
from pallas_kernels._platform import has_wide_units, vmem_bytes
from pallas_kernels._state import Weights
from pallas_kernels.routed_read import _tpu_chains, _tpu_lists, _tpu_pairs, _tpu_union

# States that are copied together.
_GROUP = 4
# The kernel by unions is the quicker one where a block of tokens reads up to so many states a choice, by the
# schedules of both, forward and backward (docs/results.md).
_AGREE, _AGREE_ON_WIDE_UNITS = 15, 27


class Plans(NamedTuple):
    """How the kernels cut a read of matrices on the chip at hand; None where there is no such kernel."""

    union: _tpu_chains.Plan | None
    pairs: _tpu_lists.Plan | None


def plans_of(q: jax.Array, choices: int, states: jax.Array) -> Plans:
    """Return how a read is cut."""
    vmem = vmem_bytes()
    return Plans(
        union=_tpu_chains.fit(q, choices, states, vmem=vmem),
        pairs=_tpu_lists.fit(q, choices, states, group=_GROUP, vmem=vmem),
    )


def fits(q: jax.Array, choices: int, states: Weights) -> bool:
    """Whether there is a kernel for these arguments: of matrices, and not of too many."""
    return not isinstance(states, tuple) and plans_of(q, choices, states) != Plans(None, None)


def routed_state_read(
    q: jax.Array,
    gates: jax.Array,
    indices: jax.Array,
    states: Weights,
    *,
    branch: Branch | None = None,
    kernels: tuple[str, ...] = ("union", "pairs"),
) -> jax.Array:
    """See `pallas_kernels.routed_read.routed_state_read`; shapes as there.

    `kernels` are those to choose from.
    """
    del branch  # matrices have none
    if isinstance(states, tuple):
        raise ValueError("states that are MLPs have no kernel for TPUs; leave implementation out")
    plans = plans_of(q, indices.shape[3], states)
    plans = Plans(*(plan if name in kernels else None for name, plan in plans._asdict().items()))
    if plans == Plans(None, None):
        raise ValueError(
            f"{states.shape[1]} states of {states.shape[3:]} do not fit a TPU's kernel; "
            "leave implementation out"
        )
    if q.size == 0 or indices.size == 0:
        return jnp.zeros((*q.shape[:-1], states.shape[-1]), q.dtype)
    return _read(q, gates.astype(jnp.float32), indices, states, plans)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _read(q, gates, indices, states, plans: Plans):
    def by_union(plan, chains):
        return _tpu_union.read(q, gates, indices, chains, states, plan, vmem_bytes())

    def by_pairs(plan, lists):
        return _tpu_pairs.read(q, gates, lists, states, plan, vmem_bytes())

    return _whichever(indices, plans, by_union, by_pairs)


def _forward(q, gates, indices, states, plans):
    return _read(q, gates, indices, states, plans), (q, gates, indices, states)


def _backward(plans, residuals, out_bar):
    q, gates, indices, states = residuals

    def by_union(plan, chains):
        return _tpu_union.read_bar(q, gates, indices, chains, states, out_bar, plan, vmem_bytes())

    def by_pairs(plan, lists):
        return _tpu_pairs.read_bar(q, gates, lists, states, out_bar, plan, vmem_bytes())

    q_bar, gates_bar, states_bar = _whichever(indices, plans, by_union, by_pairs)
    return q_bar, gates_bar, np.zeros(indices.shape, jax.dtypes.float0), states_bar.astype(states.dtype)


_read.defvjp(_forward, _backward)


def _whichever[Out](
    indices: jax.Array,
    plans: Plans,
    by_union: Callable[[_tpu_chains.Plan, jax.Array], Out],
    by_pairs: Callable[[_tpu_lists.Plan, jax.Array], Out],
) -> Out:
    """Run the kernel that is the quicker one for these choices; each is given its plan and lists."""
    union, pairs = plans
    if union is None:
        assert pairs is not None
        return by_pairs(pairs, _tpu_lists.lists(indices, pairs))
    chains, states = _tpu_chains.lists(indices, union)
    most = (_AGREE_ON_WIDE_UNITS if has_wide_units() else _AGREE) * union.choices
    if pairs is None or union.states <= most:
        return by_union(union, chains)

    def seldom(_):
        with jax.named_scope(SELDOM):
            return by_pairs(pairs, _tpu_lists.lists(indices, pairs))

    return jax.lax.cond(states <= most, lambda chains: by_union(union, chains), seldom, chains)

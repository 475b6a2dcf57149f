"""Bringing a head's states into VMEM by copies of a kernel's own, to be rounded, or turned, once a head.

As blocks of the grid's they would have to lie in HBM as they are multiplied: XLA would read and write them
all before each kernel. What is copied while a head begins has nothing to hide behind but that rounding.

Shapes: B batch, N states, H heads, K key dim, V value dim, G states that are copied together.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_TOGETHER = 8


def together(states: int) -> int:
    """Return how many of `states` are copied at a time."""
    return math.gcd(states, _TOGETHER)


def scratch(states_BNHKV: jax.Array, count: int | None = None) -> list:
    """Return what `bring` needs of VMEM for as many states: two groups of them, and their semaphores."""
    group = together(count or states_BNHKV.shape[1])
    return [
        pltpu.VMEM((2, group, *states_BNHKV.shape[3:]), states_BNHKV.dtype),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def bring(
    states_BNHKV,
    copied_2GKV,
    arrivals,
    take: Callable[[jax.Array, jax.Array], None],
    *,
    when: jax.Array,
    first: jax.Array | int = 0,
    count: int | None = None,
) -> None:
    """Call `take` with each state's number and the state, in a kernel whose grid begins with batch and heads.

    Args:
      states_BNHKV: all, in HBM.
      copied_2GKV: see `scratch`.
      arrivals: see `scratch`.
      take: is called in a loop; it counts from `first`.
      when: at which steps of the grid; at the others nothing happens.
      first: state to bring.
      count: of states, as given to `scratch`; None: all.
    """
    group, count = copied_2GKV.shape[1], count or states_BNHKV.shape[1]
    assert count % group == 0, f"{group} states at a time do not make {count}"
    row, head, groups = pl.program_id(0), pl.program_id(1), count // group

    def copy(number):
        place = jax.lax.rem(number, 2)
        source = states_BNHKV.at[row, pl.ds(first + number * group, group), head]
        return pltpu.make_async_copy(source, copied_2GKV.at[place], arrivals.at[place])

    def turn(number, _):
        pl.when(number + 1 < groups)(lambda: copy(number + 1).start())
        copy(number).wait()
        for state in range(group):
            take(number * group + state, copied_2GKV[jax.lax.rem(number, 2), state])

    # Loops, and no branches, so that how often they run can be read off the program.
    jax.lax.fori_loop(0, jnp.where(when, 1, 0), lambda number, _: copy(number).start(), None)
    jax.lax.fori_loop(0, jnp.where(when, groups, 0), turn, None)

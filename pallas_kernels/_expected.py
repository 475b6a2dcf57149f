"""What is expected of data that kernels branch and loop on: marks for who reckons what a program costs.

A mark is a scope's name, which JAX keeps with the operations in it, and changes nothing else.
"""

from collections.abc import Callable

import jax
from jax.experimental import pallas as pl

SELDOM = "seldom"
"""The scope of what runs so seldom that it does not matter to speed."""
TURNS = "turns="
"""How the scope of a loop begins whose turns depend on data; their mean follows."""


def when_seldom(condition: jax.Array) -> Callable[[Callable[[], None]], None]:
    """Like `pl.when`, of what happens once a row or document.

    Which step that is depends on data: a count of the kernel's schedule alone would take it for every step.
    """

    def run(function: Callable[[], None]) -> None:
        with jax.named_scope(SELDOM):
            pl.when(condition)(function)

    return run


def loop[Carry](
    stop: jax.Array, body: Callable[[jax.Array, Carry], Carry], carry: Carry, *, expected: float
) -> Carry:
    """`jax.lax.fori_loop` from 0 to a `stop` that depends on data, of which the mean is `expected`."""
    with jax.named_scope(f"{TURNS}{expected:.4f}"):
        return jax.lax.fori_loop(0, stop, body, carry)

"""What a kernel does so seldom that it does not matter to its speed."""

from collections.abc import Callable

import jax
from jax.experimental import pallas as pl

SELDOM = "seldom"
"""The scope's name; who reckons what a kernel costs looks for it."""


def when_seldom(condition: jax.Array) -> Callable[[Callable[[], None]], None]:
    """Like `pl.when`, of what happens once a row or document.

    Which step that is depends on data: a count of the kernel's schedule alone would take it for every step.
    """

    def run(function: Callable[[], None]) -> None:
        with jax.named_scope(SELDOM):
            pl.when(condition)(function)

    return run

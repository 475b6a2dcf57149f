"""The parameters of a checkpoint beside those of a model: what is missing, extra, reshaped."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mc_jax.training.patterns import matching

type Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of parameters by name, "blocks_0.mixer.query.kernel"."""


class Difference(NamedTuple):
    """A parameter that is not the same in both."""

    name: str
    there: tuple[int, ...] | None
    """Its shape in the checkpoint; None: it has none of that name."""
    here: tuple[int, ...] | None
    """Its shape in the model; None: it has none of that name."""

    @property
    def kind(self) -> str:
        """What is wrong with it, in a word."""
        if self.there is None:
            return "missing"
        return "extra" if self.here is None else "reshaped"

    @property
    def module(self) -> str:
        """The part that it is of: "router_query" of "blocks_0.mixer.router_query.kernel"."""
        return ".".join(self.name.split(".")[-2:-1]) or self.name


CURES = {
    "missing": "the checkpoint has none of that name: --init-new NAME draws it",
    "extra": "the model has none of that name: --init-drop NAME leaves it out",
    "reshaped": "--init-drop NAME --init-new NAME draws it anew",
}
"""What can be done about each kind of difference."""


class Fit(NamedTuple):
    """What becomes of the parameters of a model and of a checkpoint."""

    taken: tuple[str, ...]
    """Those that are taken from the checkpoint."""
    new: tuple[str, ...]
    """Those of the model that are drawn."""
    dropped: tuple[str, ...]
    """Those of the checkpoint that are left out."""
    unsettled: tuple[Difference, ...]
    """Those that nobody has decided about; where there are any, nothing may be taken."""


def compare(there: Shapes, here: Shapes, *, new: Sequence[str], drop: Sequence[str]) -> Fit:
    """Lay a checkpoint's parameters beside a model's.

    Args:
      there: the checkpoint's.
      here: the model's.
      new: patterns of the model's parameters that may be drawn, if the checkpoint has none of the name.
      drop: patterns of the checkpoint's parameters that are left out; where the model has one of the name,
        that is then new.

    Raises:
      ValueError: a pattern that is for nothing.
    """
    dropped = matching(there, drop, "--init-drop", "no parameter of the checkpoint")
    left = {name: shape for name, shape in there.items() if name not in dropped}
    drawn = matching(here.keys() - left.keys(), new, "--init-new", "no parameter that the checkpoint lacks")
    unsettled = [
        Difference(name, left.get(name), here.get(name))
        for name in sorted(left.keys() | here.keys())
        if name not in drawn and left.get(name) != here.get(name)
    ]
    taken = [name for name in here if name not in drawn and left.get(name) == here[name]]
    return Fit(tuple(taken), tuple(sorted(drawn)), tuple(sorted(dropped)), tuple(unsettled))


def table(unsettled: Sequence[Difference]) -> str:
    """Lines that tell what is not the same, and what can be done about it."""
    rows = [("parameter", "", "in the checkpoint", "in the model")]
    for difference in unsettled:
        there, here = (
            "-" if shape is None else str(list(shape)) for shape in (difference.there, difference.here)
        )
        rows.append((difference.name, difference.kind, there, here))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    kinds = {difference.kind for difference in unsettled}
    return "\n".join([*lines, *(f"{kind}: {cure}" for kind, cure in CURES.items() if kind in kinds)])

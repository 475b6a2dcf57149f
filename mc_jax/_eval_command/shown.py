"""How figures, and what a run was read with, stand in a terminal."""

import math
from collections.abc import Mapping
from typing import Any

STANDARD_ERROR = "_standard_error"


def shown(figures: Mapping[str, Any], name: str) -> str:
    """A figure as a cell of a table, with its standard error where there is one."""
    value, error = figures[name], figures.get(f"{name}{STANDARD_ERROR}")
    if math.isnan(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def print_turned(run: str, turned: Mapping[str, tuple[Any, Any]]) -> None:
    """Say which settings of a run were others than in training; nothing where none was."""
    changed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in turned.items())
    if changed:
        print(f"{run} is read otherwise than it was trained: {changed}")

"""A run's checkpoints as a table: which are whole, and what is known of each. Nothing is written."""

import math
from typing import NamedTuple

from etils import epath

from mc_jax.training.checkpoint.digest import DamagedError, read_digests, verify, walk
from mc_jax.training.checkpoint.folder import Kind, checkpoints_of, kind_of, steps_in
from mc_jax.training.metrics import read_metrics


class Listed(NamedTuple):
    """A step that has a folder among the checkpoints."""

    step: int
    bytes: int
    condition: str
    """"whole", "damaged", "unfinished", or "old", which has no digest to be held against."""
    problem: str | None
    """What of it is damaged."""
    finite: bool | None
    """Whether all its numbers are finite; None: nobody looked."""
    loss: float | None
    """The training loss of the step."""
    held_out_loss: float | None
    """The loss on held-out text after the step, if it was measured."""


def list_checkpoints(run_dir: epath.Path) -> list[Listed]:
    """The checkpoints of a run by step, each file of them read and held against its digest."""
    folder = checkpoints_of(run_dir)
    lines = {line["step"]: line for line in read_metrics(run_dir)}

    def known(step: int, name: str) -> float | None:
        value = lines.get(step, {}).get(name)
        return None if value is None or not math.isfinite(value) else value

    listed = []
    for step in steps_in(folder):
        condition, problem = _condition(folder, step)
        listed.append(
            Listed(
                step=step,
                bytes=_bytes_in(folder / str(step)),
                condition=condition,
                problem=problem,
                finite=True if condition == "whole" else None,
                loss=known(step, "loss"),
                held_out_loss=known(step, "held_out_loss"),
            )
        )
    return listed


def _condition(folder: epath.Path, step: int) -> tuple[str, str | None]:
    kind = kind_of(folder, step)
    if kind is not Kind.SAVED:
        return kind.value, None
    try:
        verify(folder / str(step), read_digests(folder / str(step)))
    except (DamagedError, FileNotFoundError) as error:
        return "damaged", str(error)
    return "whole", None


def _bytes_in(step_folder: epath.Path) -> int:
    """What a step's files take; 0 if it is deleted meanwhile."""
    try:
        return sum((step_folder / name).stat().length for name in walk(step_folder)[0])
    except FileNotFoundError:
        return 0

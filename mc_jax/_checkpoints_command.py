"""The command `mc-jax checkpoints`: which checkpoints a run has, and which are whole."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from mc_jax._arguments import must_be_run, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointsArguments:
    """List a run's checkpoints: sizes, which are whole, losses. Nothing is changed."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder that mc-jax train wrote, for example runs/quickstart."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print a JSON list instead of a table."""


def checkpoints(arguments: Sequence[str]) -> None:
    """List a run's checkpoints: sizes, which are whole, losses."""
    chosen = parse(CheckpointsArguments, arguments, program="mc-jax checkpoints")

    must_be_run(chosen.run)

    from etils import epath

    from mc_jax.data.files import json_text
    from mc_jax.training.checkpoint.listing import list_checkpoints

    listed = list_checkpoints(epath.Path(chosen.run))
    if chosen.json:
        print(json_text([checkpoint._asdict() for checkpoint in listed]))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table("step", "MB", "condition", "finite", "loss", "held-out loss", title=chosen.run)
    for one in listed:
        table.add_row(
            f"{one.step:,}",
            f"{one.bytes / 1e6:,.1f}",
            one.condition + (f": {one.problem}" if one.problem else ""),
            {True: "yes", None: ""}[one.finite],
            *("" if loss is None else f"{loss:.4f}" for loss in (one.loss, one.held_out_loss)),
        )
    # Wide where nobody's terminal says how wide, so that a name is not broken up.
    Console(width=None if sys.stdout.isatty() else 160).print(table)

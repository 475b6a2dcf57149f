"""The command `mc-jax compare`: runs side by side on one page."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from mc_jax._arguments import UsageError, must_be_run, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Write a page with the settings, curves and results of runs side by side, and a CSV file beside it."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN RUN [RUN ...]", help_behavior_hint="(required)"),
    ]
    """Folders that mc-jax train wrote, finished or not, for example runs/quickstart runs/residual."""
    output: Path = Path("compare.html")
    """The page, a file that needs no other; the table is called the same, but ends in .csv."""


def compare(arguments: Sequence[str]) -> None:
    """Write a page with the settings, curves and results of runs side by side."""
    chosen = parse(CompareArguments, arguments, program="mc-jax compare")
    if len(chosen.runs) < 2:
        raise UsageError("there is nothing to compare; write mc-jax compare RUN RUN ... --output FILE.html")
    for run in chosen.runs:
        must_be_run(run)

    from mc_jax.evaluation.comparison import write_comparison

    page, table = write_comparison(chosen.runs, chosen.output)
    print(f"{len(chosen.runs)} runs compared: {page}, {table}")

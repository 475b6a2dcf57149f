"""What a sweep leaves for its readers: dial.html, and the tables beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mc_jax.data.files import write_text
from mc_jax.evaluation.sweep.grid import Grid
from mc_jax.evaluation.sweep.runner import Outcome
from mc_jax.evaluation.sweep.table import rows_of, write_tables

PAGE = "dial.html"


def write_report(outcome: Outcome, grid: Grid, folder: Path, *, command: str) -> Path | None:
    """Write the tables and the page, each whole or not at all.

    Args:
      outcome: what the sweep has found.
      grid: what it was to find.
      folder: where.
      command: by which both are made again.

    Returns:
      Where the page is; None: no cell has a result, and there is nothing to show.
    """
    rows = rows_of(outcome)
    told: Mapping[str, Any] = {"command": command, "left_out": dict(grid.left_out)}
    write_tables(rows, outcome, told, folder)
    if not rows:
        return None
    from mc_jax.evaluation.sweep.page import dial_page  # matplotlib takes seconds

    left_out = [f"{reason} ({count} combinations)" for reason, count in grid.left_out.items()]
    failed = [f"{cell.command(None)}: {error}" for cell, error in outcome.failed]
    path = folder / PAGE
    write_text(path, dial_page(outcome.results, rows, {**told, "left_out": left_out, "failed": failed}))
    return path

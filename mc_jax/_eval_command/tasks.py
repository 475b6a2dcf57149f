"""Runs asked in tasks of recall, which are generated here."""

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mc_jax._arguments import UsageError
from mc_jax._eval_command.arguments import EvalArguments
from mc_jax._eval_command.opened import open_run, settings_of
from mc_jax._eval_command.shown import print_turned
from mc_jax.stop_signals import current

if TYPE_CHECKING:
    from rich.table import Table

    from mc_jax.evaluation.tasks.results import Recalled, TaskResult


def ask_tasks(chosen: EvalArguments, names: Sequence[str]) -> None:
    """Ask runs in tasks, print what became of it, and write it where that is asked."""
    from mc_jax.data.files import json_text, remove_unfinished
    from mc_jax.evaluation.tasks import TASKS
    from mc_jax.evaluation.tasks.files import as_json, must_be_new, write_results
    from mc_jax.evaluation.tasks.runner import check_asked, must_have_effect, recall

    names = tuple(TASKS) if tuple(names) == ("all",) else tuple(names)
    if len(set(names)) < len(names) or not names:
        raise UsageError(f"--tasks are {' '.join(names) or 'none'}; name one or more, each once, or all")
    if len(set(chosen.runs)) < len(chosen.runs):
        raise UsageError(f"runs are {' '.join(chosen.runs)}; name each once")
    for name in names:
        check_asked(name, chosen.recall)
    must_have_effect(names, chosen.recall)
    for folder in chosen.runs:
        settings_of(folder, chosen)
    if chosen.output is not None:
        must_be_new(chosen.output)
        current().tidy = remove_unfinished
    found = [
        recall(open_run(folder, chosen), names, chosen.recall, told=functools.partial(_tell, folder))
        for folder in chosen.runs
    ]
    if chosen.output is not None:
        write_results(found, chosen.output)
    if chosen.json:
        print(json_text(as_json(found)))
        return
    _print(found)
    if chosen.output is not None:
        print(f"page: {chosen.output / 'tasks.html'}; each sample: {chosen.output / 'samples.jsonl'}")


def _tell(folder: str, line: str) -> None:
    print(f"{folder}: {line}", file=sys.stderr)


def _print(found: Sequence["Recalled"]) -> None:
    from rich.console import Console

    # Wide where nobody's terminal says how wide, so that a name is not broken up.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for results in zip(*(one.tasks for one in found), strict=True):
        console.print(_table([one.origin.run for one in found], results))
        for one, result in zip(found, results, strict=True):
            if any(cell.depth is not None for cell in result.cells):
                console.print(_by_depth(one.origin.run, result))
    for one in found:
        print_turned(one.origin.run, one.origin.turned)


def _table(runs: Sequence[str], results: Sequence["TaskResult"]) -> "Table":
    """One task: a line for each length and run, and what later runs have more than the first."""
    from rich.table import Table

    from mc_jax.evaluation.tasks.page import rows_of

    names, rows = rows_of(runs, results)
    several = len(runs) > 1
    title = results[0].task if several else f"{runs[0]}: {results[0].task}"
    table = Table("tokens", *["run"] * several, "samples", *names, title=title)
    for row in rows:
        table.add_row(f"{row.length:,}", *[row.run] * several, f"{row.samples:,}", *row.means)
    return table


def _by_depth(run: str, result: "TaskResult") -> "Table":
    """A task that has depths: a line for each, a column for each length."""
    from rich.table import Table

    whole = [cell for cell in result.cells if cell.depth is None]
    depths = sorted({cell.depth for cell in result.cells if cell.depth is not None})
    values = {(cell.length, cell.depth): cell.means for cell in result.cells}
    measures = [name for name in (result.metric, "ranked first", "router hit") if name in whole[0].means]
    title = f"{run}, {result.task}: {', '.join(measures)}"
    table = Table("depth", *(f"{cell.length:,} tokens" for cell in whole), title=title, min_width=len(title))
    for depth in depths:
        cells = (values.get((cell.length, depth), {}) for cell in whole)
        texts = (
            ", ".join(f"{means[name].value:.2f}" if name in means else "-" for name in measures if means)
            for means in cells
        )
        table.add_row(f"{depth:.0%}", *texts)
    return table

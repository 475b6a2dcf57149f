"""The command `mc-jax tasks`: what a run's model recalls, in tasks that are generated here."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mc_jax._arguments import UsageError, must_be_run, parse
from mc_jax.stop_signals import current

if TYPE_CHECKING:
    from mc_jax.evaluation.tasks.results import TaskResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksArguments:
    """Measure what a run's model recalls, in tasks that are generated here."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder that mc-jax train wrote, for example runs/quickstart."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")]
    """Names of tasks, or "all"."""
    length: Annotated[tuple[int, ...], tyro.conf.arg(metavar="TOKENS ...")] = ()
    """Tokens of prompt and answer together, at most; without it, the context length of training."""
    samples: int = 20
    """Samples of each task and length."""
    seed: int = 0
    """Draws the samples."""
    alternatives: int = 9
    """Wrong answers that the right one is ranked among by log-likelihood."""
    batch_size: int = 8
    """Samples read together."""
    documents: Path | None = None
    """JSONL file (text, key, value) for the task key-value, in place of generated documents."""
    generate: bool = True
    """Generate text, too; without it log-likelihoods alone, which is faster."""
    output: Path | None = None
    """Folder to be made, with tasks.html, results.json and samples.jsonl."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of tables."""


def tasks(arguments: Sequence[str]) -> None:
    """Measure what a run's model recalls, in tasks that are generated here."""
    chosen = parse(TasksArguments, arguments, program="mc-jax tasks")
    must_be_run(chosen.run)

    from etils import epath

    from mc_jax.data.files import remove_unfinished
    from mc_jax.evaluation.tasks import TASKS
    from mc_jax.evaluation.tasks.results import TaskSettings
    from mc_jax.evaluation.tasks.runner import (
        check_settings,
        must_be_new,
        results_text,
        run_task,
        write_results,
    )
    from mc_jax.training.run import load_run, read_config

    names = tuple(TASKS) if chosen.tasks == ("all",) else chosen.tasks
    if len(set(names)) < len(names) or not names:
        raise UsageError(f"--tasks are {' '.join(names) or 'none'}; name one or more, each once, or all")
    settings = [
        TaskSettings(
            task=name,
            lengths=chosen.length or (read_config(epath.Path(chosen.run)).data.context_length,),
            samples=chosen.samples,
            seed=chosen.seed,
            alternatives=chosen.alternatives,
            batch_size=chosen.batch_size,
            documents=chosen.documents,
            generate=chosen.generate,
        )
        for name in names
    ]
    for one in settings:
        check_settings(one)
    if chosen.output is not None:
        must_be_new(chosen.output)
        current().tidy = remove_unfinished
    run = load_run(chosen.run)
    results = [run_task(run, one, told=lambda line: print(line, file=sys.stderr)) for one in settings]
    if chosen.output is not None:
        write_results(run, results, chosen.output)
    if chosen.json:
        print(results_text(run, results))
        return
    _print_tables(chosen.run, results)
    if chosen.output is not None:
        print(f"page: {chosen.output / 'tasks.html'}; each sample: {chosen.output / 'samples.jsonl'}")


def _print_tables(run: str, results: Sequence["TaskResult"]) -> None:
    from rich.console import Console
    from rich.table import Table

    from mc_jax.evaluation.tasks.page import shown

    # Wide where nobody's terminal says how wide, so that a name is not broken up.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for result in results:
        whole = [cell for cell in result.cells if cell.depth is None]
        names = list(whole[0].means)
        table = Table("tokens", "samples", *names, title=f"{run}: {result.settings.task}")
        for cell in whole:
            means = (shown(cell.means[name]) for name in names)
            table.add_row(f"{cell.length:,}", str(cell.samples), *means)
        console.print(table)
        depths = sorted({cell.depth for cell in result.cells if cell.depth is not None})
        if not depths:
            continue
        values = {(cell.length, cell.depth): cell.means for cell in result.cells}
        measures = [name for name in names[:2] if name != "greedy"]
        by_depth = Table("depth", *(f"{cell.length:,} tokens" for cell in whole), title=", ".join(measures))
        for depth in depths:
            cells = (values.get((cell.length, depth), {}) for cell in whole)
            texts = (", ".join(f"{means[name].value:.2f}" for name in measures if means) for means in cells)
            by_depth.add_row(f"{depth:.0%}", *texts)
        console.print(by_depth)

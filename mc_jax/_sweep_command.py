"""The command `mc-jax sweep`: the capacity dial of runs, a cell for each way to read them."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mc_jax._arguments import UsageError, must_be_run, parse
from mc_jax.config import AggregationName, Segmentation
from mc_jax.data.sources import has_fields
from mc_jax.stop_signals import current

if TYPE_CHECKING:
    from mc_jax.evaluation.sweep.grid import Grid
    from mc_jax.evaluation.sweep.runner import Outcome, Source

_STATE_DTYPE = Literal["float32", "bfloat16", "int8"] | None


class FailedCells(ValueError):
    """Some cells of a sweep have no result; the others do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepArguments:
    """Turn the dial of trained runs: measure every combination of these settings, on the same text."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
    ]
    """Folders that mc-jax train wrote, for example runs/quickstart."""
    output: Path | None = None
    """Folder for dial.html, results.csv, .json, .md and cells; one that is there is gone on with."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure cells again that are there."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the cells, and what is left out, and measure nothing."""
    step: int | None = None
    """Step of the checkpoints; None: each run's newest."""
    context_length: tuple[int, ...] = ()
    """Tokens in a window; without values, here and below, as each run was trained."""
    segment_length: tuple[int, ...] = ()
    """Tokens after which the memory's state is cached."""
    aggregation: tuple[AggregationName, ...] = ()
    """How the online and the cached memories are read together; "none" turns the caches off."""
    top_k: tuple[int, ...] = ()
    """Cached memories that "sparse", "average" and "null" read."""
    segmentation: tuple[Segmentation, ...] = ()
    """Every segment is a memory, or a token's segments are grouped by the digits of their number."""
    mode: tuple[Literal["windows", "last-k", "by-position", "stream"], ...] = ("windows",)
    """How the text is read, as of mc-jax eval."""
    stride: int | None = None
    """Tokens scored per window of a long document by mode windows; None: as configured, or half of it."""
    last_k: int | None = None
    """Tokens that a window of mode last-k scores; None: half of the shortest window."""
    first: int | None = None
    """First target of a document that mode last-k scores; None: as early as the longest window can."""
    max_cached: tuple[int | None, ...] = ()
    """Places for cached memories in each layer, in mode stream; None: one for each segment."""
    when_full: Literal["error", "drop-oldest"] | None = None
    """When all these places are taken: stop, or (None) forget the oldest memory."""
    state_dtype: tuple[_STATE_DTYPE, ...] = ()
    """Numbers that cached memories are kept as, in mode stream; None: as computed."""
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Text to be read instead of held-out text: files, folders and patterns, as mc-jax prepare takes them."""
    text_field: str = "text"
    """Field of JSON, or column of .parquet, that has the text; a.b is field b of field a."""
    corpus: str | None = None
    """A folder of mc-jax prepare with the runs' tokenizer, whose held-out part is read instead."""


def sweep(arguments: Sequence[str]) -> None:
    """Turn the dial of runs: quality against memory and FLOPs, as tables and a page."""
    chosen = parse(SweepArguments, arguments, program="mc-jax sweep")
    if not chosen.runs:
        raise UsageError(
            "no run is named; write mc-jax sweep RUN ..., for example "
            "mc-jax sweep runs/quickstart --aggregation gated none --output dial"
        )
    for run in chosen.runs:
        must_be_run(run)
    _must_have_effect(chosen)

    from mc_jax.evaluation.sweep.grid import Axes, grid_of

    named = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(Axes)}
    grid = grid_of(chosen.runs, Axes(**named | {"when_full": chosen.when_full or Axes.when_full}))
    if not grid.cells:
        raise UsageError(f"no cell is left: {next(iter(grid.left_out))}")
    if chosen.dry_run:
        _print_grid(grid)
        return
    assert chosen.output is not None, "without it, it is a dry run"
    _print_left_out(grid)
    current().end_at_once("stopped by {signal}; the same command goes on with the cells that are missing")
    outcome = _run(grid, chosen.output, chosen)

    from mc_jax.evaluation.sweep.report import write_report

    command = shlex.join(["mc-jax", "sweep", *arguments])
    page = write_report(outcome, grid, chosen.output, command=command)
    print(f"page: {page}; tables: {chosen.output / 'results.csv'}, .json, .md")
    if outcome.failed:
        cell, error = outcome.failed[0]
        raise FailedCells(
            f"{len(outcome.failed)} of {len(grid.cells)} cells have no result, the first of "
            f"{cell.run} with {_told(cell.settings())}: {error}; the same "
            "command tries them again"
        )


def _must_have_effect(chosen: SweepArguments) -> None:
    """See that no option is given that another one makes void.

    Raises:
      UsageError: one is, or a value is given twice.
    """
    for field in dataclasses.fields(chosen):
        values = getattr(chosen, field.name)
        if isinstance(values, tuple) and len(set(map(str, values))) < len(values):
            name = "RUN" if field.name == "runs" else f"--{field.name.replace('_', '-')}"
            raise UsageError(f"{name} has a value twice; name each once")
    if not chosen.mode:
        raise UsageError("--mode names none; leave it out for windows, or name one or more")
    if chosen.output is None and not chosen.dry_run:
        raise UsageError("--output is missing: the folder for the page and the tables, for example dial")
    if chosen.overwrite and chosen.dry_run:
        raise UsageError("--overwrite has no effect with --dry-run; leave one of them out")
    if chosen.text and chosen.corpus is not None:
        raise UsageError("--corpus has no effect with --text, which is read instead; leave one of them out")
    if chosen.text_field != SweepArguments.text_field and not any(map(has_fields, chosen.text)):
        raise UsageError("--text-field has no effect without a --text that has fields; leave it out")
    of_modes = (
        ("stream", ("max_cached", "when_full", "state_dtype")),
        ("last-k", ("last_k", "first")),
        ("windows", ("stride",)),
    )
    for mode, names in of_modes:
        for name in names:
            if mode not in chosen.mode and getattr(chosen, name) not in (None, ()):
                raise UsageError(f"--{name.replace('_', '-')} has no effect without --mode {mode}; add it")
    if chosen.when_full is not None and not any(places is not None for places in chosen.max_cached):
        raise UsageError("--when-full has no effect without a number of --max-cached; leave it out")


def _run(grid: "Grid", folder: Path, chosen: SweepArguments) -> "Outcome":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from mc_jax.evaluation.sweep.runner import Done, run_sweep

    console = Console(stderr=True, highlight=False)
    columns = (
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
    )
    is_bar = sys.stderr.isatty() and console.is_interactive
    with Progress(*columns, console=console, expand=True, disable=not is_bar) as progress:
        task = progress.add_task("cells", total=len(grid.cells))
        seconds: list[float] = []
        looked_at = 0

        def told(done: Done) -> None:
            nonlocal looked_at
            looked_at += 1
            if done.seconds is not None:
                seconds.append(done.seconds)
            left = ""
            if seconds:
                rest = (len(grid.cells) - looked_at) * sum(seconds) / len(seconds)
                left = f", about {int(rest) // 60}:{int(rest) % 60:02} left"
            progress.update(task, advance=1, description=f"cells{left}")
            how = "was there" if done.seconds is None else f"{done.seconds:.1f} s"
            if done.error is not None:
                how = f"failed ({done.error.partition('\n')[0]})"
            line = f"{looked_at}/{len(grid.cells)} {done.cell.run}: {_told(done.cell.settings())}: {how}"
            if is_bar:
                progress.console.print(line, markup=False, soft_wrap=True)
            else:
                print(f"{line}{left}", file=sys.stderr, flush=True)

        return run_sweep(grid, folder, _source(chosen), overwrite=chosen.overwrite, told=told)


def _source(chosen: SweepArguments) -> "Source":
    from mc_jax.data.dataset import open_prepared
    from mc_jax.data.texts import text_store
    from mc_jax.evaluation.core import held_out_text
    from mc_jax.evaluation.sweep.runner import Source

    if chosen.text:
        words = ["--text", *map(str, chosen.text)]
        if chosen.text_field != SweepArguments.text_field:
            words += ["--text-field", chosen.text_field]
        return Source(
            step=chosen.step,
            text_of=lambda run: text_store(chosen.text, run.dataset.tokenizer, text_field=chosen.text_field),
            words=tuple(words),
        )
    corpus = chosen.corpus
    if corpus is not None:
        return Source(
            step=chosen.step,
            text_of=lambda run: held_out_text(open_prepared(Path(corpus).expanduser()), corpus),
            words=("--data.corpus", corpus),
        )
    return Source(step=chosen.step, text_of=lambda run: held_out_text(run.dataset, run.folder))


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in settings.items()
        if value is not None and (name, value) != ("segmentation", "constant")
    )


def _print_grid(grid: "Grid") -> None:
    for cell in grid.cells:
        print(f"{cell.run}: {_told(cell.settings())}{' (as trained)' if cell.is_own else ''}")
    programs = len(grid.groups())
    print(f"{len(grid.cells)} cells of {programs} compiled programs")
    _print_left_out(grid)


def _print_left_out(grid: "Grid") -> None:
    for reason, count in grid.left_out.items():
        print(f"left out, {count} combination{'s' if count > 1 else ''}: {reason}")

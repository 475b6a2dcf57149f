"""The page of what runs recall: tables, heat maps of length and depth, a sample of each task."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from mc_jax.evaluation._page import escape, page, responsive_picture, section
from mc_jax.evaluation.tasks.results import Cell, Mean, Recalled, TaskResult, less_the_first

_STYLE = """
.numbers td { white-space: nowrap; }
.wide + .note { margin-top: 0.6rem; }
figure { margin-top: 1.5rem; }
"""
_SHOWN_PROMPT = 400  # characters at either end of a sample's prompt


class Row(NamedTuple):
    """A line of a task's table."""

    length: int
    run: str
    samples: int
    means: tuple[str, ...]


def rows_of(runs: Sequence[str], results: Sequence[TaskResult]) -> tuple[list[str], list[Row]]:
    """A task's table: what was measured, and a line for each length and run.

    Args:
      runs: what the runs are called.
      results: the task's, of each run; later ones have a line, too, of what they differ in from the first.
    """
    names = list(dict.fromkeys(name for result in results for cell in result.cells for name in cell.means))
    rows: list[Row] = []
    for length in sorted({length for result in results for length in result.settings.length}):
        for run, result in zip(runs, results, strict=True):
            rows += _rows(run, length, result.cells, names)
        for run, result in zip(runs[1:], results[1:], strict=True):
            rows += _rows(f"{run} less the first", length, less_the_first(result, results[0]), names)
    return names, rows


def _rows(run: str, length: int, cells: Sequence[Cell], names: Sequence[str]) -> Iterator[Row]:
    for cell in cells:
        if cell.length == length and cell.depth is None:
            means = (shown(cell.means[name]) if name in cell.means else "-" for name in names)
            yield Row(length, run, cell.samples, tuple(means))


def tasks_page(found: Sequence[Recalled]) -> str:
    """HTML that needs nothing else: what was read, and a section for each task."""
    names = [PurePath(one.origin.run).name for one in found]
    results = zip(*(one.tasks for one in found), strict=True)
    sections = [section(one[0].task, _task(names, one)) for one in results]
    return page(
        ", ".join(names), "What it recalls", [section("What was asked", _runs(found)), *sections], _STYLE
    )


def _runs(found: Sequence[Recalled]) -> str:
    lines = []
    for one in found:
        changed = ", ".join(f"{name} {old} → {new}" for name, (old, new) in one.origin.turned.items())
        how = f"read otherwise than it was trained: {changed}" if changed else "read as it was trained"
        lines.append(f"<p>{escape(one.origin.run)}, step {one.origin.step:,}, {escape(how)}.</p>")
    return "".join(lines)


def _task(runs: Sequence[str], results: Sequence[TaskResult]) -> str:
    first = results[0]
    settings = first.settings
    chance = 1 / (1 + settings.alternatives)
    note = f"{settings.samples} samples of each length, seed {settings.seed}; mean ± standard error."
    measured = {name for cell in first.cells for name in cell.means}
    if first.metric in measured:
        note += f" Right is “{first.metric}”."
    if any(cell.depth is not None for cell in first.cells):
        note += f" Chance of being ranked first is {chance:.0%}."
    if "router hit" in measured:
        note += " Router hit: layers and heads that read the needle's segment more than any other cached one."
    if len(runs) > 1:
        note += " Runs that were asked the same are compared sample by sample."
    sources = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in first.sources().items())
    pictures = "".join(_picture(run, result) for run, result in zip(runs, results, strict=True))
    return (
        f'{_table(runs, results)}<p class="note">{escape(note)}</p>'
        f'<p class="note">{escape(sources)}</p>{pictures}{_sample(first)}'
    )


def _table(runs: Sequence[str], results: Sequence[TaskResult]) -> str:
    names, rows = rows_of(runs, results)
    several = ["run"] * (len(runs) > 1)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("tokens", *several, *names))
    body = "".join(
        f'<tr><th scope="row">{row.length:,}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in (*[row.run] * len(several), *row.means))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def shown(mean: Mean) -> str:
    """A mean with its standard error as people read it."""
    return f"{mean.value:.3f}" + ("" if mean.stderr is None else f" ± {mean.stderr:.3f}")


def _picture(run: str, result: TaskResult) -> str:
    from mc_jax.evaluation import _plots
    from mc_jax.evaluation.tasks._heat_map import heat_map

    cells = {(cell.depth, cell.length): cell.means for cell in result.cells if cell.depth is not None}
    if not cells:
        return ""
    depths, lengths = sorted({depth for depth, _ in cells}), sorted({length for _, length in cells})
    measured = {name for means in cells.values() for name in means}
    names = [name for name in (result.metric, "ranked first", "router hit") if name in measured]
    values = [
        np.array([[_value(cells.get((depth, length)), name) for length in lengths] for depth in depths])
        for name in names
    ]
    return responsive_picture(
        lambda theme, narrow: heat_map(values, names, lengths, depths, theme, narrow),
        _plots,
        f"Heat maps of {' and '.join(names)} of {run} by depth and length",
        f"{run}. Depth is where the answer stands in the context: 0 % is its beginning, 100 % the question.",
    )


def _value(means: dict[str, Mean] | None, name: str) -> float:
    return np.nan if means is None or name not in means else means[name].value


def _sample(result: TaskResult) -> str:
    line = result.samples[0]
    if not isinstance(line["prompt"], str):
        return ""
    prompt = line["prompt"]
    if len(prompt) > 2 * _SHOWN_PROMPT:
        prompt = f"{prompt[:_SHOWN_PROMPT]} […] {prompt[-_SHOWN_PROMPT:]}"
    said = f"<p>generated:</p><pre>{escape(line['generated'])}</pre>" if "generated" in line else ""
    return (
        f"<details><summary>a sample</summary><pre>{escape(prompt)}</pre>"
        f"<p>right: {escape(', '.join(line['answers']))}</p>{said}</details>"
    )

"""The page of a run's tasks: tables, heat maps of length and depth, a sample of each."""

from collections.abc import Sequence

import numpy as np

from mc_jax.evaluation._page import escape, page, picture, section
from mc_jax.evaluation.tasks.results import Cell, Mean, TaskResult

_SHOWN_PROMPT = 400  # characters at either end of a sample's prompt


def tasks_page(run_name: str, results: Sequence[TaskResult]) -> str:
    """HTML that needs nothing else: a section for each task."""
    return page(run_name, "What it recalls", [section(one.settings.task, _task(one)) for one in results])


def _task(result: TaskResult) -> str:
    settings = result.settings
    chance = 1 / (1 + settings.alternatives)
    note = (
        f"{settings.samples} samples of each length, seed {settings.seed}; right by “{result.metric}”; "
        f"chance of being ranked first is {chance:.0%}; mean ± standard error."
        if any(cell.depth is not None for cell in result.cells)
        else f"{settings.samples} samples of each length, seed {settings.seed}; mean ± standard error."
    )
    sources = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in result.sources().items())
    return (
        f'{_table([cell for cell in result.cells if cell.depth is None])}<p class="note">{escape(note)}</p>'
        f'<p class="note">{escape(sources)}</p>{_picture(result)}{_sample(result)}'
    )


def _table(cells: Sequence[Cell]) -> str:
    names = list(cells[0].means)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("tokens", *names))
    rows = "".join(
        f'<tr><th scope="row">{cell.length:,}</th>'
        + "".join(f"<td>{shown(cell.means[name])}</td>" for name in names)
        + "</tr>"
        for cell in cells
    )
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def shown(mean: Mean) -> str:
    """A mean with its standard error as people read it."""
    return f"{mean.value:.3f}" + ("" if mean.stderr is None else f" ± {mean.stderr:.3f}")


def _picture(result: TaskResult) -> str:
    from mc_jax.evaluation import _plots
    from mc_jax.evaluation.tasks._heat_map import heat_map

    cells = {(cell.depth, cell.length): cell.means for cell in result.cells if cell.depth is not None}
    if not cells:
        return ""
    depths, lengths = sorted({depth for depth, _ in cells}), sorted({length for _, length in cells})
    names = [name for name in next(iter(cells.values())) if name in (result.metric, "ranked first")]
    values = [
        np.array([[_value(cells.get((depth, length)), name) for length in lengths] for depth in depths])
        for name in names
    ]
    return picture(
        lambda theme: heat_map(values, names, lengths, depths, theme),
        _plots,
        f"Heat maps of {' and '.join(names)} by depth and length",
        "Depth is where the answer stands in the context: 0 % is its beginning, 100 % the question.",
    )


def _value(means: dict[str, Mean] | None, name: str) -> float:
    return np.nan if means is None else means[name].value


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

"""What the dial's page shows: its rows as points and lines, and which of them are worth having.

A view is a mode and a context length, within which all is read on the same targets in the same windows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

type Row = Mapping[str, Any]

_VARIED = ("segment_length", "top_k", "segmentation", "max_cached", "state_dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A cell of a view."""

    row: Row
    """Its figures."""
    series: int
    """Which colour it has."""
    label: str
    """Which of its series it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """Cells that may be set against each other."""

    title: str
    """How the text is read, in words."""
    points: tuple[Point, ...]
    """The cells."""
    ends: Mapping[str, Mapping[str, float]]
    """What the dial's ends cost on the same text: "attention" and, for models with a memory, "recurrence"."""


def views_of(rows: Sequence[Row], costs: Sequence[Mapping[str, Any]]) -> list[View]:
    """The views, as they come in the rows.

    Args:
      rows: of `rows_of`.
      costs: each row's, of `costs_of`.
    """
    series = series_of(rows)
    found: dict[tuple[Any, ...], list[tuple[Row, Mapping[str, Any]]]] = {}
    for row, cost in zip(rows, costs, strict=True):
        found.setdefault((row["mode"], row["context_length"]), []).append((row, cost))
    return [
        View(
            title=_title(mode, length),
            points=tuple(
                Point(row=row, series=series.index(series_name(row, rows)), label=label_of(row, rows))
                for row, _ in some
            ),
            # An attention model alone has no recurrence; of several runs the first one's ends are shown.
            ends={
                name: cost for _, costs in reversed(some) for name, cost in costs.items() if name != "cell"
            },
        )
        for (mode, length), some in found.items()
    ]


def series_of(rows: Sequence[Row]) -> list[str]:
    """The names of what has a colour of its own: an aggregation, of a run where there are several."""
    return list(dict.fromkeys(series_name(row, rows) for row in rows))


def series_name(row: Row, rows: Sequence[Row]) -> str:
    """The series that a row belongs to."""
    aggregation = row["aggregation"] or "attention alone"
    name = "caches off" if aggregation == "none" else aggregation
    if len({other["run"] for other in rows}) == 1:
        return name
    return f"{Path(row['run']).name} · {name}"


def label_of(row: Row, rows: Sequence[Row]) -> str:
    """What tells a row from the others of its series and view, in few words."""
    if row["aggregation"] in (None, "none"):
        return ""
    words = []
    for name in _VARIED:
        value = row[name]
        others = {other[name] for other in rows if other["aggregation"] not in (None, "none")}
        if value is None or len(others) == 1:
            continue
        words.append(
            {
                "segment_length": f"segment {value}",
                "top_k": f"top {value}",
                "segmentation": "grouped" if value == "logarithmic" else "",
                "max_cached": f"{value} places",
                "state_dtype": str(value),
            }[name]
        )
    return ", ".join(word for word in words if word)


def full_name(row: Row, rows: Sequence[Row]) -> str:
    """A row's series and label together."""
    label = label_of(row, rows)
    return series_name(row, rows) + (f", {label}" if label else "")


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points (cost, loss) that no other one beats at as low a cost, cheapest first."""
    best, found = float("inf"), []
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if points[place][1] < best:
            best = points[place][1]
            found.append(place)
    return found


def bytes_in_words(count: float) -> str:
    """A number of bytes in the unit that suits it: 512 B, 72 KiB, 1.5 MiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = next((power for power in range(len(units)) if count < 1024 ** (power + 1)), len(units) - 1)
    scaled = count / 1024**power
    return f"{scaled:.3g} {units[power]}" if scaled < 1000 else f"{scaled:,.0f} {units[power]}"


def _title(mode: str, length: int | None) -> str:
    if length is None:
        return "whole documents as a stream"
    how = {"last-k": ", the last tokens", "by-position": ", side by side"}.get(mode, "")
    return f"windows of {length:,} tokens{how}"

"""The pictures of the dial's page, one colour a series, each drawn light and dark, wide and narrow."""

import dataclasses
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from mc_jax.evaluation._comparison_plots import DASHES, colour_of
from mc_jax.evaluation._plots import ROUND, Theme, style, svg
from mc_jax.evaluation.sweep.view import View, bytes_in_words, pareto

_WIDE_FOR_A_LOGARITHM = 4.0
_LEAST_BITS = 0.004  # an axis of less shows noise
_MOST_NAMED_LINES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """A kind of cost that quality is set against."""

    column: str
    """Its column in the rows."""
    label: str
    """The axis in words."""
    end: str = ""
    """Its name in the costs of the dial's ends; empty: they are not known."""
    in_bytes: bool = False
    attention: str = "attention"
    """What a transformer's cost is called."""


MEMORY = Cost(
    column="memory_bytes",
    label="memory of one sequence",
    end="memory_bytes",
    in_bytes=True,
    attention="KV cache",
)
FLOPS = Cost(column="flops_per_token", label="FLOPs a token, by formula", end="flops_per_token")
TIME = Cost(column="microseconds_per_token", label="microseconds a scored token, measured")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A quantity along an axis."""

    series: int
    """Its colour."""
    dash: int
    """Which line of its series it is."""
    label: str
    """What stands at its end."""
    x: np.ndarray
    """[n], rising and above zero."""
    y: np.ndarray
    """[n], finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """Axes with lines over a logarithm of tokens."""

    title: str
    lines: Sequence[Line]
    x_label: str
    y_label: str
    from_zero: bool = False
    """Whether zero is drawn: what is shown is a difference."""


def scatter(views: Sequence[View], costs: Sequence[Cost], theme: Theme, narrow: bool) -> str:
    """Bits per byte against costs, axes for each view and cost, with the Pareto front and the dial's ends."""
    shown = [(view, cost) for view in views for cost in costs]
    with matplotlib.rc_context(style(theme)):
        figure, grid = _axes(len(shown), narrow, height=3.5)
        for (view, cost), axes in zip(shown, grid, strict=False):
            _scatter(view, cost, axes, theme, narrow, with_title=cost is costs[0] or narrow)
        figure.draw_without_rendering()  # the layout, which says where there is room for names
        for (view, cost), axes in zip(shown, grid, strict=False):
            _name_front(view, cost, axes, theme, narrow)
        return svg(figure)


def lines(panels: Sequence[Panel], theme: Theme, narrow: bool) -> str:
    """Axes side by side, or one under another where the page is narrow."""
    with matplotlib.rc_context(style(theme)):
        figure, grid = _axes(len(panels), narrow, height=3.3)
        for panel, axes in zip(panels, grid, strict=False):
            axes.grid(axis="y")
            axes.set_title(panel.title, loc="left")
            if panel.from_zero:
                axes.axhline(0, color=theme.muted, linewidth=1)
            for line in panel.lines:
                axes.plot(
                    line.x,
                    line.y,
                    color=colour_of(line.series, theme),
                    linestyle=DASHES[line.dash % len(DASHES)],
                    linewidth=1.7,
                    marker="o",
                    markersize=3.5,
                )
            axes.set_xscale("log", base=2)
            ticks = sorted({float(x) for line in panel.lines for x in line.x})
            axes.set_xticks(_thinned(ticks, 5 if narrow else 8))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND))
            axes.set_xlabel(panel.x_label)
            axes.set_ylabel(panel.y_label)
            axes.tick_params(length=0)
        figure.draw_without_rendering()  # the layout, which says where there is room for names
        for panel, axes in zip(panels, grid, strict=False):
            _name_lines(panel, axes, theme)
        return svg(figure)


def _axes(count: int, narrow: bool, height: float) -> tuple[Figure, list[Axes]]:
    columns = 1 if narrow else min(2, count)
    rows = -(-count // columns)
    size = (4.0, 0.8 * height * rows) if narrow else (10.8, height * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in grid[count:]:
        unused.set_visible(False)
    return figure, grid


def _scatter(view: View, cost: Cost, axes: Axes, theme: Theme, narrow: bool, *, with_title: bool) -> None:
    axes.grid(axis="both")
    axes.set_title(view.title if with_title else " ", loc="left")
    ends = {name: end[cost.end] for name, end in view.ends.items() if cost.end}
    for x in ends.values():
        axes.axvline(x, color=theme.muted, linewidth=1.2, linestyle=(0, (2, 2)), zorder=1)
    points = [(point.row[cost.column], point.row["bits_per_byte"]) for point in view.points]
    front = [points[place] for place in pareto(points)]
    axes.plot(*zip(*front, strict=True), color=theme.muted, linewidth=1.2, alpha=0.6, zorder=2)
    for point, (x, y) in zip(view.points, points, strict=True):
        colour = colour_of(point.series, theme)
        error = point.row["less_own_bits_per_byte_standard_error"]
        if error is not None:
            axes.plot([x, x], [y - error, y + error], color=colour, linewidth=2, alpha=0.45, zorder=3)
        is_best = (x, y) in front
        axes.plot(
            [x], [y], "o", color=colour, markersize=7 if is_best else 5, alpha=1 if is_best else 0.6, zorder=4
        )
        if point.row["is_own"]:
            axes.plot([x], [y], "o", markersize=12, markerfacecolor="none", color=theme.ink, zorder=5)
    known = [x for x, _ in points] + list(ends.values())
    is_logarithmic = max(known) / min(known) > _WIDE_FOR_A_LOGARITHM
    if is_logarithmic:
        axes.set_xscale("log", base=2)
        octaves = math.log2(max(known) / min(known))
        octaves_a_tick = max(1, math.ceil(octaves / (4 if narrow else 7)))
        axes.xaxis.set_major_locator(LogLocator(base=2.0**octaves_a_tick))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 6, steps=ROUND))
    shown = bytes_in_words if cost.in_bytes else _short
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: shown(x)))
    axes.margins(x=0.08, y=0.22)
    low, high = axes.get_ylim()
    lacking = max(0.0, _LEAST_BITS - (high - low)) / 2
    axes.set_ylim(low - lacking, high + lacking)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3f}"))
    axes.set_xlabel(cost.label)
    axes.set_ylabel("bits per byte, lower is better")
    axes.tick_params(length=0)
    for line, (name, x) in enumerate(ends.items()):
        across = axes.transAxes.inverted().transform(axes.transData.transform((x, 0)))[0]
        axes.annotate(
            "caches off" if name == "recurrence" else cost.attention,
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4 if across < 0.5 else -4, -9 - 10 * line),  # two lines, for the ends may be near
            textcoords="offset points",
            ha="left" if across < 0.5 else "right",
            fontsize=8,
            color=theme.muted,
        )


def _name_front(view: View, cost: Cost, axes: Axes, theme: Theme, narrow: bool) -> None:
    """Names of the points on the front, best first, wherever there is room for one."""
    points = [(point.row[cost.column], point.row["bits_per_byte"]) for point in view.points]
    scale = axes.figure.dpi / 72 if axes.figure is not None else 1.0
    size = 7.5 if narrow else 8.0
    within = axes.get_window_extent()
    dots = [axes.transData.transform(point) for point in points]
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in dots]
    top = within.y1 - 22 * scale
    taken.append((within.x0, top, within.x1, within.y1))  # the names of the ends
    for place in reversed(pareto(points)):
        label, (x, y) = view.points[place].label, dots[place]
        width, height = 0.58 * size * len(label) * scale, size * scale
        for right, up in ((False, -1), (True, 1), (True, -1), (False, 1)):
            left = x + 6 * scale if right else x - 6 * scale - width
            low = y + 5 * scale if up > 0 else y - 5 * scale - height
            box = left, low, left + width, low + height
            fits = within.x0 <= left and box[2] <= within.x1 and within.y0 <= low and box[3] <= within.y1
            if not label or not fits or any(_overlap(box, other) for other in taken):
                continue
            axes.annotate(
                label,
                points[place],
                xytext=(6 if right else -6, 5 if up > 0 else -5),
                textcoords="offset points",
                ha="left" if right else "right",
                va="bottom" if up > 0 else "top",
                fontsize=size,
                color=theme.ink,
            )
            taken.append(box)
            break


def _name_lines(panel: Panel, axes: Axes, theme: Theme) -> None:
    """Names at the ends of lines, where they are few and apart; those of one colour need them."""
    if len(panel.lines) > _MOST_NAMED_LINES:
        return
    size = 7.5
    height = size * (axes.figure.dpi / 72 if axes.figure is not None else 1.0)
    taken: list[float] = []
    for line in panel.lines:
        end = (line.x[-1], line.y[-1])
        y = axes.transData.transform(end)[1]
        if not line.label or any(abs(y - other) < height for other in taken):
            continue
        taken.append(y)
        axes.annotate(
            line.label,
            end,
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=size,
            color=theme.muted,
            annotation_clip=False,
        )


type _Box = tuple[float, float, float, float]


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _thinned(ticks: Sequence[float], most: int) -> Sequence[float]:
    return ticks[:: -(-len(ticks) // most)]


def _short(number: float) -> str:
    """Three digits: 950, 12.3k, 1.20M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"

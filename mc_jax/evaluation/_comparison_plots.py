"""The pictures of a comparison, one colour a run, each drawn light and dark, wide and narrow.

The runs' colours repeat after eight, with other dashes.
"""

import dataclasses
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from mc_jax.evaluation._plots import ROUND, Theme, plain_ticks, running_mean, style, svg, thin

_POINTS = 300
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))
"""Line styles of the first eight runs, the next eight, and so on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A quantity of one run along an axis."""

    run: int
    """Its place among the runs, which is its colour."""
    x: np.ndarray
    """[n], rising."""
    y: np.ndarray
    """[n], finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """A set of axes with a curve a run."""

    title: str
    curves: Sequence[Curve]
    x_label: str
    y_label: str = ""
    smoothed: bool = False
    """Whether a running mean over a fiftieth of the curve is drawn."""
    logarithmic: bool = False
    dots: bool = False
    """Whether the points are marked."""
    percent: bool = False
    ticks: Sequence[str] = ()
    """Names of x = 0, 1, ...; empty: x is a number."""
    even: np.ndarray | None = None
    """[ticks], a grey line for what equal weights would be."""


def panels(shown: Sequence[Panel], theme: Theme, narrow: bool) -> str:
    """Panels side by side, or one under another where the page is narrow."""
    columns = 1 if narrow else len(shown)
    lines = -(-len(shown) // columns)
    size = (4.0, 2.75 * lines) if narrow else (10.8, 3.5)
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=size, layout="constrained")
        for panel, axes in zip(shown, figure.subplots(lines, columns, squeeze=False).flat, strict=True):
            _draw(panel, axes, theme, narrow)
        return svg(figure)


def results(
    names: Sequence[str],
    values: Sequence[tuple[int, float, float | None]],
    label: str,
    theme: Theme,
    narrow: bool,
) -> str:
    """A dot a run on one axis, with its standard error where it has one.

    Args:
      names: of the runs drawn, [n].
      values: place of the run, value and error, [n].
      label: of the axis.
      theme: colours.
      narrow: whether the page is.
    """
    with matplotlib.rc_context(style(theme)):
        width, height = (4.0 if narrow else 10.8), 0.75 + 0.3 * len(values)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        for line, (run, value, error) in enumerate(values):
            colour = colour_of(run, theme)
            if error is not None:
                axes.plot([value - error, value + error], [line, line], color=colour, linewidth=2, alpha=0.6)
            axes.plot([value], [line], "o", color=colour, markersize=7)
            axes.annotate(
                f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"),
                (value, line),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=theme.muted,
            )
        longest = 18 if narrow else 44
        shown = [name if len(name) <= longest else f"{name[: longest - 1]}…" for name in names]
        axes.set_yticks(range(len(names)), shown)
        axes.set_ylim(len(names) - 0.5, -0.8)
        axes.margins(x=0.12)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, steps=ROUND))
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=theme.ink)
        return svg(figure)


def colour_of(run: int, theme: Theme) -> str:
    """The colour of a run, by its place."""
    return theme.runs[run % len(theme.runs)]


def _draw(panel: Panel, axes: Axes, theme: Theme, narrow: bool) -> None:
    axes.grid(axis="y")
    axes.set_title(panel.title, loc="left")
    if panel.even is not None:
        axes.plot(panel.even, color=theme.muted, linewidth=1.2, linestyle=(0, (2, 2)), zorder=1)
    for curve in panel.curves:
        x, y = curve.x, curve.y
        if panel.smoothed:
            y = running_mean(y, min(len(y), max(5, len(y) // 50)))
        axes.plot(
            *thin(x, y, _POINTS),
            color=colour_of(curve.run, theme),
            linestyle=DASHES[curve.run // len(theme.runs) % len(DASHES)],
            linewidth=1.7,
            marker="o" if panel.dots else None,
            markersize=3.5,
        )
    if panel.logarithmic:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    if panel.percent:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
    axes.set_xlabel(panel.x_label)
    if panel.y_label:
        axes.set_ylabel(panel.y_label)
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), panel.ticks)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 5, steps=ROUND))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.margins(x=0.02)
    axes.tick_params(length=0)

"""The report's pictures, drawn by matplotlib as SVG text, once for a light page and once for a dark one.

matplotlib takes seconds to import: pages import this module when they are written, and not before.

T tokens, S cached segments, L layers.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

_MOST_POINTS = 2000
ROUND = (1, 2, 2.5, 5, 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a picture; the page's style sheet has the same."""

    ink: str
    muted: str
    grid: str
    line: str
    faint: str
    held_out: str
    low: str
    high: str
    runs: tuple[str, ...]


LIGHT = Theme(
    ink="#1c1d1f",
    muted="#63666b",
    grid="#e6e7e9",
    line="#1f66c1",
    faint="#a9c6ea",
    held_out="#b4540a",
    low="#e9f0fa",
    high="#0a2f66",
    runs=("#1f66c1", "#b4540a", "#1a7f4b", "#8a3fb0", "#b3273f", "#0f7d8c", "#8a6d00", "#5b616b"),
)
DARK = Theme(
    ink="#e8e9eb",
    muted="#9da1a8",
    grid="#2e3136",
    line="#6aaaf5",
    faint="#31527d",
    held_out="#f09a52",
    low="#1e2836",
    high="#cfe4ff",
    runs=("#6aaaf5", "#f09a52", "#5cc98d", "#c88bea", "#f27d90", "#4fc3d4", "#d9b93b", "#a7adb8"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of a run, in nats per token."""

    steps: np.ndarray
    """[n], rising."""
    loss: np.ndarray
    """[n], of each of these steps, finite."""
    held_out: float | None
    """On held-out text at the end; None: not measured."""
    measured: tuple[np.ndarray, np.ndarray]
    """Steps and held-out losses while training, two arrays of one length, 0 where there are none."""
    bits: tuple[float, str]
    """Bits per byte for one nat per token, the right axis over the left, and what that axis is called."""


def loss_curve(losses: Losses, theme: Theme, *, narrow: bool = False) -> str:
    """Training loss over steps, every step faint and a running mean strong, and held-out loss.

    Args:
      losses: What is drawn; held-out loss at the end as a dashed line.
      theme: Colours.
      narrow: For a narrow page.
    """
    steps, loss, measured, held_out = losses.steps, losses.loss, losses.measured, losses.held_out
    bits_per_nat, axis = losses.bits
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(4.2, 3.8) if narrow else (9.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y")
        axes.plot(*thin(steps, loss), color=theme.faint, linewidth=0.8, label="each step")
        window = min(len(loss), max(5, len(loss) // 50))
        axes.plot(
            *thin(steps, running_mean(loss, window)),
            color=theme.line,
            linewidth=2,
            label=f"mean of {window} steps",
        )
        if len(measured[0]):
            dots = {"marker": "o", "markersize": 4, "linewidth": 1.4}
            axes.plot(*measured, color=theme.held_out, label="held-out", **dots)
        if held_out is not None:
            label = f"held-out, at the end: {held_out:.3f}"
            axes.axhline(held_out, color=theme.held_out, linewidth=1.4, linestyle=(0, (5, 3)), label=label)
        # A logarithm, so that the long tail of a run is more than a flat line at the bottom.
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        axes.set_ylabel("loss, nats per token (logarithmic)")
        _steps_below(axes, narrow)
        right = axes.secondary_yaxis(
            "right",
            functions=(
                lambda nats: np.asarray(nats) * bits_per_nat,
                lambda bits: np.asarray(bits) / bits_per_nat,
            ),
        )
        right.set_ylabel(axis)
        plain_ticks(right.yaxis)
        right.spines["right"].set_visible(False)
        _legend_above(axes, 2 if narrow else 4)
        return svg(figure)


def training_curves(
    curves: Sequence[tuple[str, np.ndarray, np.ndarray]], theme: Theme, *, narrow: bool = False
) -> str:
    """What else is written down at each step, a small plot each.

    Args:
      curves: Label, steps [n] and values [n] of each.
      theme: Colours.
      narrow: One under another, for a narrow page.
    """
    lines, columns = (len(curves), 1) if narrow else (1, len(curves))
    with matplotlib.rc_context(style(theme)):
        size = (4.2, 2.1 * lines) if narrow else (9.2, 2.4)
        figure = Figure(figsize=size, layout="constrained")
        for axes, (label, steps, values) in zip(
            figure.subplots(lines, columns, squeeze=False).flat, curves, strict=True
        ):
            axes.grid(axis="y")
            axes.plot(*thin(steps, values), color=theme.line, linewidth=1)
            axes.set_title(label, loc="left")
            axes.set_ylim(0, 1.05 * max(values.max(), np.finfo(float).tiny))
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            _steps_below(axes, True)
        return svg(figure)


def _steps_below(axes: Axes, narrow: bool) -> None:
    """Steps as round numbers under a curve, fewer of them where it is narrow."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 8, integer=True, steps=ROUND))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.margins(x=0.01)


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, borderaxespad=0.2)


class Marks(NamedTuple):
    """What a reader's eye is led to."""

    segments: tuple[int, ...]
    """Numbers, from 0, of cached segments."""
    asked: int
    """The first of the positions, up to the last, that are to read them."""


def router_reads(
    gates: np.ndarray,
    numbers: Sequence[int],
    segment_length: int,
    theme: Theme,
    *,
    narrow: bool = False,
    marks: Marks | None = None,
    rest: str = "online",
) -> str:
    """One heat map a layer: how much of each token's reading comes from each memory.

    Args:
      gates: [L, T, S + 1], the online memory or the null last; nan where there is nothing to read yet.
      numbers: What the L layers are called.
      segment_length: Tokens of a segment.
      theme: Colours.
      narrow: One map under another, for a narrow page.
      marks: Rows that are framed from a position on; None: none.
      rest: What the last row is called.
    """
    layers, tokens, cached = gates.shape[0], gates.shape[1], gates.shape[2] - 1
    columns = 1 if layers == 1 or narrow else 2 if layers <= 12 else 3
    lines = -(-layers // columns)
    colours = LinearSegmentedColormap.from_list("gates", [theme.low, theme.line, theme.high])
    # Most gates are small: a square root keeps them apart.
    drawing = {
        "origin": "lower",
        "aspect": "auto",
        "cmap": colours,
        "norm": PowerNorm(0.5, vmin=0.0, vmax=1.0),
        "interpolation": "nearest",
    }
    # The last row lies apart, and stays visible over many cached ones.
    height = max(1.0, cached / 12)
    bottom = cached + 0.5 + 0.35 * height
    top = bottom + height
    stride = next(stride for stride in (1, 2, 5, 10, 20, 50, 100, cached) if cached <= 6 * stride)
    numbered = sorted({1, *range(stride, cached + 1, stride)})
    space = ConstrainedLayoutEngine(wspace=0.04, hspace=0.05)
    with matplotlib.rc_context(style(theme)):
        height_of_one = 1.9 if narrow or columns > 1 else 2.6
        figure = Figure(figsize=(4.0 if narrow else 9.2, 1.0 + lines * height_of_one), layout=space)
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for unused in grid.flat[layers:]:
            unused.set_visible(False)
        image = None
        for layer, axes in enumerate(grid.flat[:layers]):
            axes.imshow(gates[layer, :, :cached].T, extent=(0, tokens, 0.5, cached + 0.5), **drawing)
            image = axes.imshow(gates[layer, :, cached:].T, extent=(0, tokens, bottom, top), **drawing)
            axes.set(xlim=(0, tokens), ylim=(0.5, top))
            axes.set_title(f"Layer {numbers[layer]}", loc="left")
            for boundary in range(segment_length, tokens, segment_length):
                axes.axvline(boundary, color=theme.grid, linewidth=0.6)
            if marks is not None:
                _frame(axes, marks, tokens, theme)
            axes.set_yticks([*numbered, (bottom + top) / 2], [*map(str, numbered), rest])
            axes.xaxis.set_major_locator(MaxNLocator(6 if columns < 3 else 4, integer=True, steps=ROUND))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.tick_params(length=0, labelbottom=layer + columns >= layers)
        figure.supxlabel("token position", fontsize=10, color=theme.muted)
        figure.supylabel("memory that is read (cached segment)", fontsize=10, color=theme.muted)
        assert image is not None
        if narrow:
            bar = figure.colorbar(image, ax=grid, location="top", aspect=30, pad=0.015)
        else:
            bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 2.2 / lines), aspect=22, pad=0.015)
        bar.set_ticks([0, 0.05, 0.25, 0.5, 1.0], labels=["0%", "5%", "25%", "50%", "100%"])
        bar.set_label("share of the reading")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        return svg(figure)


def _frame(axes: Axes, marks: Marks, tokens: int, theme: Theme) -> None:
    """Frame the segments at the asked positions, and lead to them from the left."""
    lowest, highest = marks.segments[0] + 0.5, marks.segments[-1] + 1.5
    asked = max(1, tokens - marks.asked), highest - lowest
    line = {"edgecolor": theme.held_out, "facecolor": "none", "clip_on": False}
    axes.add_patch(Rectangle((0, lowest), tokens, highest - lowest, linewidth=0.8, linestyle=":", **line))
    axes.add_patch(Rectangle((tokens - asked[0], lowest), *asked, linewidth=1.8, **line))


def router_while_training(
    steps: np.ndarray, shares: np.ndarray, even: float, theme: Theme, *, narrow: bool = False
) -> str:
    """The share of the reading that cached memories get, over training: every layer faint, the mean strong.

    Args:
      steps: [n], rising.
      shares: [n, L], from 0 to 1.
      even: the share if all memories were weighed alike, a dashed line.
      theme: Colours.
      narrow: For a narrow page.
    """
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(4.2, 3.2) if narrow else (9.2, 2.8), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y")
        if shares.shape[1] > 1:
            lines = axes.plot(steps, shares, color=theme.faint, linewidth=1)
            lines[0].set_label("each layer")
        dots = {"marker": "o", "markersize": 4, "linewidth": 2}
        axes.plot(steps, shares.mean(axis=1), color=theme.line, label="mean of the layers", **dots)
        axes.axhline(even, color=theme.muted, linewidth=1.4, linestyle=(0, (5, 3)), label="all weighed alike")
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
        axes.set_ylabel("share of cached memories")
        _steps_below(axes, narrow)
        _legend_above(axes, 2 if narrow else 3)
        return svg(figure)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """[n] -> [n]: the mean over `window` values around each one, over fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def thin(steps: np.ndarray, values: np.ndarray, most: int = _MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points of a long curve that keep its peaks: the extremes of each stretch."""
    if len(values) <= most:
        return steps, values
    stretches = np.array_split(np.arange(len(values)), most // 2)
    kept = [sorted({s[np.argmin(values[s])], s[np.argmax(values[s])]}) for s in stretches]
    indices = np.concatenate(kept)
    return steps[indices], values[indices]


def plain_ticks(axis: Axis) -> None:
    """Round plain numbers on a logarithmic axis, also where it spans less than a decade."""
    axis.set_major_locator(MaxNLocator(9, steps=ROUND))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_tick_params(length=0)


def style(theme: Theme) -> dict[str, object]:
    """What matplotlib's `rc_context` takes, for a picture in a page."""
    return {
        "svg.fonttype": "none",  # text stays text, in the reader's own font
        "svg.hashsalt": "report",  # the same picture is the same file
        "font.family": "sans-serif",
        "font.sans-serif": ["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans"],
        "font.size": 10,
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10.5,
        "axes.edgecolor": theme.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
    }


def svg(figure: Figure) -> str:
    """A figure as SVG text, always the same for the same figure."""
    text = io.StringIO()
    figure.savefig(
        text,
        format="svg",
        transparent=True,
        dpi=200,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    return text.getvalue()

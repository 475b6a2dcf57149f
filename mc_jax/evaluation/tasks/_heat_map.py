"""The picture of a task: how well its samples of each length and depth are answered, drawn by matplotlib.

matplotlib takes seconds to import: only `page.py` imports this module, and only when it draws.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mc_jax.evaluation._plots import Theme, style, svg


def heat_map(
    values: Sequence[np.ndarray],
    names: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    theme: Theme,
    narrow: bool,
) -> str:
    """Heat maps of depth over length, every cell with its number from 0 to 1; side by side if that fits.

    Args:
      values: one array [depths, lengths] a map; nan where there is no sample.
      names: what each map shows.
      lengths: tokens, rising.
      depths: shares of the context before the answer, rising; the context's beginning is at the top.
      theme: colours.
      narrow: whether the page is.
    """
    colours = LinearSegmentedColormap.from_list("scores", [theme.low, theme.line, theme.high])
    with matplotlib.rc_context(style(theme)):
        lines, columns = (len(values), 1) if narrow else (1, len(values))
        size = (4.0 if narrow else 9.2, 0.6 + lines * (0.7 + (0.2 if narrow else 0.3) * len(depths)))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, array, name in zip(grid.flat, values, names, strict=True):
            axes.imshow(array, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
            for (row, column), value in np.ndenumerate(array):
                if np.isfinite(value):
                    # The ends of the colours are ink and paper of a light page, or of a dark one.
                    ink = theme.ink if value < 0.3 else theme.low
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
            axes.set_title(name, loc="left")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axes.tick_params(length=0)
        figure.supxlabel("tokens", fontsize=10, color=theme.muted)
        figure.supylabel("depth of the answer", fontsize=10, color=theme.muted)
        return svg(figure)

"""The figure of what a router reads, on the report and on the page of a text.

L layers, T tokens, S cached segments.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mc_jax.evaluation._page import responsive_picture
from mc_jax.evaluation.needle import NeedleReading

_REST = {"online": "from the online memory", "null": "that the null takes, which reads nothing"}


def router_figure(
    plots: Any,
    gates: np.ndarray,
    layers: Sequence[int],
    segment_length: int,
    needle: NeedleReading | None = None,
    *,
    rest: str,
) -> str:
    """HTML of one heat map a layer.

    Args:
      plots: the module `_plots`, which takes seconds to import.
      gates: [L, T, S + 1], each token's shares, the online memory or the null last; at least one segment
        ends before the last token.
      layers: what the layers are called.
      segment_length: tokens of a segment.
      needle: what is framed; None: nothing.
      rest: what the last share is of: "online" or "null".
    """
    tokens = gates.shape[1]
    ended = (tokens - 1) // segment_length
    may_read = np.arange(tokens)[:, None] // segment_length > np.arange(ended)
    cached = np.where(may_read, gates[:, :, :ended].astype(float), np.nan)
    shown = np.concatenate([cached, gates[:, :, -1:].astype(float)], axis=-1)
    marks = None if needle is None else plots.Marks(needle.segments, needle.asked[0])
    alternative = (
        f"One heat map a layer, layers {layers[0]} to {layers[-1]}: the share of each of {tokens:,} tokens' "
        f"reading that comes from cached segments 1 to {ended} and {_REST[rest]}"
    )
    caption = (
        "A column is a token, a row a memory: the more the colour stands out from the page, the more of what "
        "that token read came from there, and each column adds up to 100%. Blank: segments that had not "
        "ended yet. Vertical lines: ends of segments. The colour scale is a square root, so that small "
        "shares show."
    )
    if rest == "null":
        caption += " The null reads nothing; the online memory is read beside all of it."
    if needle is not None:
        caption += " Dotted: the segment that holds the needle; framed: where it is asked for."
    return responsive_picture(
        lambda theme, narrow: plots.router_reads(
            shown, layers, segment_length, theme, narrow=narrow, marks=marks, rest=rest
        ),
        plots,
        alternative,
        caption,
    )

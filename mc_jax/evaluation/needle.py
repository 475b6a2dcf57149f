"""How a router finds the segments that hold a needle: a part of a text that its end asks for.

Shapes: L layers with a memory, B rows, T tokens, H heads, S cached segments.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_jax.caching.aggregations import Gates, Selection
from mc_jax.nn import LanguageModel


class Span(NamedTuple):
    """A part of a text, from `start` to before `stop`."""

    start: int
    """First character, or token."""
    stop: int
    """The one after the last."""
    unit: Literal["characters", "tokens"] = "characters"
    """What the two count; tokens are those of the run's tokenizer, from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleReading:
    """How a router finds the segments that hold a needle."""

    segments: tuple[int, ...]
    """Numbers, from 0, of the segments that the needle was written in."""
    asked: tuple[int, int]
    """First position of the row whose reading counts, and the one after the last."""
    share: np.ndarray
    """[L, H], mean share of these segments in the reading."""
    hit_rate: np.ndarray
    """[L, H], part of the asked tokens that read one of them more than any other cached segment."""
    any_hit_rate: float
    """Part of the asked tokens for which some layer and head does."""
    chance: float
    """Mean part of the cached segments that these are: the hit rate of who reads any of them."""

    def to_json(self) -> dict[str, Any]:
        """JSON values, segments numbered from 0."""
        return {
            "segments": list(self.segments),
            "asked": list(self.asked),
            "share": self.share.tolist(),
            "hit_rate": self.hit_rate.tolist(),
            "any_hit_rate": self.any_hit_rate,
            "chance": self.chance,
        }


def segments_of(needle: Span, text: str, token_bytes: np.ndarray, segment_length: int) -> tuple[int, ...]:
    """Numbers, from 0, of the segments that hold a needle, in a row of a separator and a text's tokens.

    Args:
      needle: a part of the text.
      text: after the separator.
      token_bytes: bytes of each of its tokens.
      segment_length: tokens of a segment.

    Raises:
      ValueError: the needle is empty, or not within the text.
    """
    size = len(text) if needle.unit == "characters" else len(token_bytes)
    if not 0 <= needle.start < needle.stop <= size:
        raise ValueError(
            f"the needle is {needle.unit} {needle.start} to {needle.stop} of a text of {size}; "
            "give a start below its stop, both within the text"
        )
    first, last = needle.start + 1, needle.stop
    if needle.unit == "characters":
        ends = np.cumsum(token_bytes)
        first_byte, stop_byte = (len(text[:place].encode()) for place in needle[:2])
        first = int(np.searchsorted(ends, first_byte, "right")) + 1
        last = int(np.searchsorted(ends, stop_byte)) + 1
    return tuple(range(first // segment_length, last // segment_length + 1))


def find(
    gates: np.ndarray, segments: tuple[int, ...], asked_tokens: int, segment_length: int
) -> NeedleReading:
    """How the last tokens of gates [L, T, H, S + 1] read some segments.

    Raises:
      ValueError: no token is asked, or one that does not find all of these segments in the cache.
    """
    tokens = gates.shape[1]
    start = tokens - asked_tokens
    if not 0 < start < tokens or start // segment_length <= segments[-1]:
        raise ValueError(
            f"the needle ends in segment {segments[-1] + 1}, which is cached from position "
            f"{(segments[-1] + 1) * segment_length} on, and the {asked_tokens} asked tokens begin at "
            f"{start}; put more text between the two, or ask fewer tokens, at least 1"
        )
    asked = gates[:, start:]
    hit = _hits(asked[..., :-1], segments)  # [L, asked, H]
    return NeedleReading(
        segments=segments,
        asked=(start, tokens),
        share=asked[..., list(segments)].sum(axis=-1).mean(axis=1),
        hit_rate=hit.mean(axis=1),
        any_hit_rate=float(hit.any(axis=(0, 2)).mean()),
        chance=float(np.mean(len(segments) / (np.arange(start, tokens) // segment_length))),
    )


def hits_at_end(
    model: LanguageModel, rows: np.ndarray, lengths: np.ndarray, segments: Sequence[tuple[int, ...]]
) -> list[np.ndarray | None]:
    """Whether each layer and head reads a needle's segment most, of the cached ones, at a row's last token.

    Args:
      model: one with a router.
      rows: tokens, filled up behind their ends [B, T].
      lengths: of the rows without what fills them up [B].
      segments: those that hold each row's needle.

    Returns:
      For each row bool [L, H]; None where not all of its segments have ended before its last token's.
    """
    graph, parameters = nnx.split(model)
    length = model.config.segment_length
    gates = np.asarray(_last_gates(graph, parameters, rows, lengths, -(-rows.shape[1] // length)))
    return [
        _hits(gates[:, row], wanted) if wanted[-1] < (tokens - 1) // length else None
        for row, (wanted, tokens) in enumerate(zip(segments, lengths, strict=True))
    ]


@jax.jit(static_argnames=("graph", "segments"))
def _last_gates(graph, parameters, rows, lengths, segments):
    """What each row's last token reads of the cached segments [L, B, H, S].

    Args:
      graph: the model's static part.
      parameters: its weights.
      rows: tokens, filled up behind their ends [B, T].
      lengths: of the rows [B].
      segments: S.
    """

    def of_layer(gates: Gates | Selection) -> jax.Array:
        last = jax.tree.map(
            lambda x: jnp.take_along_axis(x, jnp.reshape(lengths - 1, (-1, *[1] * (x.ndim - 1))), axis=1),
            gates,
        )
        return (last.dense(segments) if isinstance(last, Selection) else last).cached[:, 0]

    return nnx.merge(graph, parameters).map_gates(rows, of_layer)


def _hits(gates: np.ndarray, segments: Sequence[int]) -> np.ndarray:
    """Whether gates [..., S] are largest on one of the segments."""
    return np.isin(gates.argmax(axis=-1), segments)

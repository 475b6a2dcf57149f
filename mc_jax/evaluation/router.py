"""What a run's router reads: its shares on held-out text, and where a given text sends it.

Shapes: L layers with a memory, T tokens, H heads, S cached segments.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax.config import ModelConfig
from mc_jax.evaluation.report import RouterPicture
from mc_jax.training.router_shares import RouterOnText, RouterShares, has_router, memory_layers
from mc_jax.training.run import Run
from mc_jax.training.step import split_model

_NO_MEMORY = "This model has no layers with a memory."
_NO_ROUTER = "This model's aggregation has no router: nothing weighs its memories token by token."


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What each token of a text reads, in each layer and head."""

    tokens: tuple[str, ...]
    """The T tokens of the row: the separator, as an empty text, and the text's."""
    layers: tuple[int, ...]
    """The numbers, from 1, of the L layers that have a memory."""
    segment_length: int
    """Tokens of a segment; the token at position t may read segments 0 to t // segment_length - 1."""
    gates: np.ndarray
    """[L, T, H, S + 1] float32, each token's shares of the cached segments, the online memory last."""
    needle: NeedleReading | None
    """How the needle was found, where one was named."""

    def to_json(self) -> dict[str, Any]:
        """JSON values, gates as means over heads [L, T, S + 1]."""
        needle = self.needle
        return {
            "tokens": list(self.tokens),
            "layers": list(self.layers),
            "segment_length": self.segment_length,
            "gates": self.gates.mean(axis=2).tolist(),
            "needle": needle
            and {
                "segments": list(needle.segments),
                "asked": list(needle.asked),
                "share": needle.share.tolist(),
                "hit_rate": needle.hit_rate.tolist(),
                "any_hit_rate": needle.any_hit_rate,
            },
        }


def held_out_shares(run: Run) -> RouterShares | None:
    """What the run's routers read of its held-out text; None without a router, such a text, or a cache in it.

    The windows are those that its training measures, so the numbers are those of the last metrics.
    """
    if run.dataset.held_out is None or not has_router(run.config.model):
        return None
    graph, parameters = split_model(run.model)
    return RouterOnText(graph, run.config, run.dataset.held_out).measure(parameters)


def router_picture(run: Run, shares: RouterShares | None) -> RouterPicture | str:
    """What the memories of each layer read at the start of the first held-out document, mean over heads.

    A sentence that says why there is none, where it is so. `shares` are told beside it.
    """
    model, store = run.config.model, run.dataset.held_out
    missing = why_no_router(model)
    if missing is not None:
        return missing
    if store is None:
        return "There is no held-out text to read."
    length = min(run.config.data.context_length, len(store.document(0)) + 1)
    tokens = store.sequence(0, 0, length)
    return RouterPicture(
        gates=_gates(run, tokens).mean(axis=2),
        layers=memory_layers(model),
        segment_length=model.segment_length,
        text=run.dataset.tokenizer.decode(tokens),
        shares=shares,
    )


def why_no_router(model: ModelConfig) -> str | None:
    """A sentence that says why a model has no router; None where it has one."""
    if "memory" not in model.layer_pattern:
        return _NO_MEMORY
    return None if has_router(model) else _NO_ROUTER


def inspect_router(run: Run, text: str, needle: Span | None = None, *, asked_tokens: int = 1) -> Inspection:
    """Read a text as one document, and tell what each token reads; where a needle is named, how it is found.

    Args:
      run: as `load_run` reads it back.
      text: what is read, after a separator.
      needle: the part of the text that the last tokens are to find; None: nothing is looked for.
      asked_tokens: tokens at the text's end whose reading counts, such as those of a question's last words.

    Raises:
      ValueError: the model has no router, the text is empty, or the needle is not within a segment that the
        asked tokens find in the cache.
    """
    model, tokenizer = run.config.model, run.dataset.tokenizer
    missing = why_no_router(model)
    if missing is not None:
        raise ValueError(f"{run.folder} has no router to inspect. {missing}")
    ids = tokenizer.encode(text)
    if not len(ids):
        raise ValueError("the text to inspect is empty; give one of more than a segment's tokens")
    row = np.concatenate([[tokenizer.separator_id], ids]).astype(np.int32)
    found = None
    gates = _gates(run, row)
    if needle is not None:
        first, last = _positions(needle, text, tokenizer.bytes_of(ids))
        segments = tuple(range(first // model.segment_length, last // model.segment_length + 1))
        found = _find(gates, segments, asked_tokens, model.segment_length)
    return Inspection(
        tokens=("", *(tokenizer.decode([token]) for token in ids)),
        layers=memory_layers(model),
        segment_length=model.segment_length,
        gates=gates,
        needle=found,
    )


def _gates(run: Run, row: np.ndarray) -> np.ndarray:
    """Shares of a row's tokens [T] as [L, T, H, S + 1], the online memory last."""
    gates = jax.jit(run.model.read_gates)(jnp.asarray(row, jnp.int32)[None])
    assert gates is not None, f"{run.config.model.aggregation!r} gave no gates"
    shares = np.concatenate([np.asarray(gates.cached), np.asarray(gates.online)[..., None]], axis=-1)[:, 0]
    return shares / shares.sum(axis=-1, keepdims=True)


def _positions(needle: Span, text: str, token_bytes: np.ndarray) -> tuple[int, int]:
    """First and last position in the row of the tokens that hold a needle, the separator being at 0."""
    size = len(text) if needle.unit == "characters" else len(token_bytes)
    if not 0 <= needle.start < needle.stop <= size:
        raise ValueError(
            f"the needle is {needle.unit} {needle.start} to {needle.stop} of a text of {size}; "
            "give a start below its stop, both within the text"
        )
    if needle.unit == "tokens":
        return needle.start + 1, needle.stop
    ends = np.cumsum(token_bytes)
    first_byte, stop_byte = (len(text[:place].encode()) for place in needle[:2])
    return int(np.searchsorted(ends, first_byte, "right")) + 1, int(np.searchsorted(ends, stop_byte)) + 1


def _find(
    gates: np.ndarray, segments: tuple[int, ...], asked_tokens: int, segment_length: int
) -> NeedleReading:
    """How the last tokens of gates [L, T, H, S + 1] read some segments."""
    tokens = gates.shape[1]
    start = tokens - asked_tokens
    if not 0 < start < tokens or start // segment_length <= segments[-1]:
        raise ValueError(
            f"the needle ends in segment {segments[-1]}, which is cached from position "
            f"{(segments[-1] + 1) * segment_length} on, and the {asked_tokens} asked tokens begin at "
            f"{start}; put more text between the two, or ask fewer tokens, at least 1"
        )
    asked = gates[:, start:]
    hit = np.isin(asked[..., :-1].argmax(axis=-1), segments)  # [L, asked, H]
    return NeedleReading(
        segments=segments,
        asked=(start, tokens),
        share=asked[..., list(segments)].sum(axis=-1).mean(axis=1),
        hit_rate=hit.mean(axis=1),
        any_hit_rate=float(hit.any(axis=(0, 2)).mean()),
    )

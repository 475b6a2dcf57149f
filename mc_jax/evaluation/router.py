"""What a run's router reads: its shares on held-out text, and where a given text sends it.

Shapes: L layers with a memory, T tokens, H heads, S cached segments.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_jax.caching.aggregations import shares_of
from mc_jax.config import ModelConfig
from mc_jax.evaluation.needle import NeedleReading, Span, find, segments_of
from mc_jax.evaluation.report import RouterPicture
from mc_jax.facts import AGGREGATION_FACTS
from mc_jax.training.router_shares import RouterOnText, RouterShares, has_router, memory_layers
from mc_jax.training.run import Run
from mc_jax.training.step import split_model

_MOST_BYTES = 2 << 30
_NO_MEMORY = "This model has no layers with a memory."
_NO_ROUTER = "This model's aggregation has no router: nothing weighs its memories token by token."


class Blocks(NamedTuple):
    """Mean shares, over heads and over the tokens of a block, of groups of cached segments."""

    positions: tuple[tuple[int, int], ...]
    """First position of each of the P blocks, and the one after its last."""
    segments: tuple[tuple[int, int], ...]
    """First of each of the G groups' segments, from 0, and the one after its last."""
    shares: np.ndarray
    """[L, P, G + 1], the online memory, or the null, last."""


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
    """[L, T, H, S + 1] float32, each token's shares of the cached segments, the online memory or the null
    last."""
    rest: str
    """What the last one is: "online" or "null"."""
    needle: NeedleReading | None
    """How the needle was found, where one was named."""

    def to_json(self) -> dict[str, Any]:
        """JSON values, gates as means over heads [L, T, S + 1]."""
        entropy, relative = self.entropy()
        return {
            "tokens": list(self.tokens),
            "layers": list(self.layers),
            "rest": self.rest,
            "segment_length": self.segment_length,
            "entropy": entropy.tolist(),
            "relative_entropy": relative.tolist(),
            "needle": self.needle and self.needle.to_json(),
            "gates": self.gates.mean(axis=2).astype(float).round(6).tolist(),
        }

    def entropy(self) -> tuple[np.ndarray, np.ndarray]:
        """Entropy of a token's shares in nats, and its part of that of equal ones, means over tokens [L, H].

        The tokens are those that see at least one cached memory; without such ones both are 0.
        """
        seen = np.arange(len(self.tokens)) // self.segment_length
        gates = self.gates[:, seen > 0].astype(float)
        if not gates.size:
            return (np.zeros((len(self.layers), self.gates.shape[2])),) * 2
        entropy = -np.where(gates > 0, gates * np.log(np.where(gates > 0, gates, 1)), 0).sum(axis=-1)
        equal = np.log1p(seen[seen > 0])[None, :, None]
        return entropy.mean(axis=1), (entropy / equal).mean(axis=1)

    def blocks(self, most: int = 8) -> Blocks:
        """The same in a few blocks of positions and groups of cached segments.

        Args:
          most: blocks, and groups, at most.
        """
        tokens, ended = len(self.tokens), (len(self.tokens) - 1) // self.segment_length
        width = max(1, -(-(ended + 1) // most))
        starts = range(0, ended + 1, width)
        positions = tuple(
            (start * self.segment_length, min(tokens, (start + width) * self.segment_length))
            for start in starts
        )
        segments = tuple((start, min(ended, start + width)) for start in starts if start < ended)
        gates = self.gates.mean(axis=2).astype(float)
        shares = np.stack(
            [
                np.stack(
                    [
                        *(
                            gates[:, begin:end, first:stop].sum(axis=-1).mean(axis=-1)
                            for first, stop in segments
                        ),
                        gates[:, begin:end, -1].mean(axis=-1),
                    ],
                    axis=-1,
                )
                for begin, end in positions
            ],
            axis=1,
        )
        return Blocks(positions=positions, segments=segments, shares=shares)


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
        rest=_rest(model),
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
    layers, found = memory_layers(model), None
    size = 4 * len(layers) * model.num_heads * len(row) * (2 + len(row) // model.segment_length)
    if size > _MOST_BYTES:
        raise ValueError(
            f"what {len(row):,} tokens read takes {size / 2**30:.1f} GiB; give a shorter text, or set a "
            "larger --model.segment-length"
        )
    if needle is not None and model.segmentation != "constant":
        raise ValueError(
            f"a needle's segment is not read alone with model.segmentation {model.segmentation!r}; name no "
            "needle, or set --model.segmentation constant"
        )
    gates = _gates(run, row)
    if needle is not None:
        segments = segments_of(needle, text, tokenizer.bytes_of(ids), model.segment_length)
        found = find(gates, segments, asked_tokens, model.segment_length)
    return Inspection(
        tokens=("", *(tokenizer.decode([token]) for token in ids)),
        layers=layers,
        segment_length=model.segment_length,
        gates=gates,
        rest=_rest(model),
        needle=found,
    )


def _gates(run: Run, row: np.ndarray) -> np.ndarray:
    """Shares of a row's tokens [T] as [L, T, H, S + 1], the online memory, or the null, last."""
    gates = jax.jit(run.model.read_gates)(jnp.asarray(row, jnp.int32)[None])
    assert gates is not None, f"{run.config.model.aggregation!r} gave no gates"
    has_null = AGGREGATION_FACTS[run.config.model.aggregation].has_null
    cached, rest = shares_of(gates, has_null=has_null)
    return np.concatenate([np.asarray(cached), np.asarray(rest)[..., None]], axis=-1)[:, 0]


def _rest(model: ModelConfig) -> str:
    return "null" if AGGREGATION_FACTS[model.aggregation].has_null else "online"

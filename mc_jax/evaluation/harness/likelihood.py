"""Log-likelihoods of continuations and of whole texts, by the forward pass of training."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mc_jax.data.documents import Document, tokenize
from mc_jax.data.store import memory_store
from mc_jax.data.windows import overlapping_windows
from mc_jax.evaluation.harness.sizes import filled_size, grouped
from mc_jax.evaluation.modes import score_windows
from mc_jax.evaluation.tasks.sample import RowSample
from mc_jax.evaluation.tasks.scoring import Judge, recalls


class Continuation(NamedTuple):
    """Tokens, and those that they go on from."""

    context: np.ndarray
    """int32, at least one."""
    tokens: np.ndarray
    """int32, those that are scored."""


def continuation_likelihoods(
    judge: Judge,
    asked: Sequence[Continuation],
    *,
    length: int,
    told: Callable[[int], None] = lambda _: None,
) -> list[tuple[float, bool]]:
    """The log-likelihood of each continuation in nats, and whether each of its tokens is the likeliest.

    Contexts are cut from the left to what `length` leaves; rows are read in batches of few shapes.

    Args:
      judge: the model.
      asked: what is scored.
      length: input tokens that the model reads at once, at most.
      told: hears how many more are done.

    Raises:
      ValueError: a continuation that has no room, or logits that are not finite.
    """
    found: list[tuple[float, bool]] = [(0.0, True)] * len(asked)
    rows: list[tuple[int, RowSample]] = []
    for number, (context, tokens) in enumerate(asked):
        if len(tokens) > length:
            raise ValueError(
                f"a continuation has {len(tokens)} tokens, and the model reads {length} at once; set "
                "context_length higher"
            )
        if len(tokens):  # nothing is certain to follow
            inputs = np.concatenate([context, tokens])[-length - 1 : -1].astype(np.int32)
            places = np.arange(len(inputs) - len(tokens), len(inputs), dtype=np.int32)
            row = RowSample(tokens=inputs, places=places, targets=tokens, candidates=tokens[:1], sources={})
            rows.append((number, row))
    segment_length = judge.model.config.segment_length
    for size, group in grouped(
        rows, lambda row: filled_size(len(row[1].tokens), segment_length=segment_length, most=length)
    ):
        places = max(len(row.places) for _, row in group)
        for some in itertools.batched(group, judge.batch_size):
            read = recalls(judge, [row for _, row in some], size, places)
            for (number, row), recall in zip(some, read, strict=True):
                found[number] = recall.log_likelihood * len(row.places), recall.share == 1
            told(len(some))
    return found


def text_log_likelihoods(
    judge: Judge,
    texts: Sequence[str],
    *,
    length: int,
    stride: int,
    told: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """The log-likelihood of each text in nats, its end left out.

    A text is a document: the separator stands before it, and its windows are those of the mode "windows".
    With `stride` equal to `length` they are lm-eval's: side by side, the last one moved back to be full.

    Args:
      judge: the model.
      texts: one that is empty has log-likelihood 0.
      length: input tokens of a window, at most.
      stride: targets that are scored in each but a text's first window.
      told: hears how many more windows are done.

    Raises:
      ValueError: losses that are not finite.
    """
    numbers = [number for number, text in enumerate(texts) if text]
    sums = np.zeros(len(texts))
    if not numbers:
        return sums.tolist()
    documents = (Document(str(number), texts[number]) for number in numbers)
    store = memory_store(tokenize(documents, judge.tokenizer), judge.tokenizer)
    windows = [
        window
        for document, tokens in enumerate(np.diff(store.offsets).tolist())
        # As many pairs as tokens: the separator at the end is not scored.
        for window in overlapping_windows(store, document, length=length, stride=stride, pairs=tokens)
    ]
    segment_length = judge.model.config.segment_length
    for size, group in grouped(
        windows,
        lambda window: filled_size(window.end - window.start, segment_length=segment_length, most=length),
    ):
        for scored in score_windows(group, judge.model, store, length=size, batch_size=judge.batch_size):
            sums[numbers[scored.document]] -= scored.nats.sum(dtype=np.float64)
            told(1)
    for number, value in enumerate(sums):
        if not math.isfinite(value):
            raise ValueError(
                f"the log-likelihood of text {number} is {value}, so it tells nothing: the weights are too "
                "large for this precision, or the training diverged"
            )
    return sums.tolist()

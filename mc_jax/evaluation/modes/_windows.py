"""Scoring windows by training's forward, a batch at a time.

Shapes: B windows of a batch, T tokens.
"""

from collections.abc import Iterable, Iterator

import jax
import numpy as np

from mc_jax.caching import Storage
from mc_jax.data.store import TokenStore
from mc_jax.data.windows import Window, batches_of, num_pairs, overlapping_windows
from mc_jax.evaluation.modes._interface import Scored, cache_bytes
from mc_jax.nn import LanguageModel
from mc_jax.training.losses import BatchLosses
from mc_jax.training.step import split_model


def score_windows(
    windows: Iterable[Window], model: LanguageModel, store: TokenStore, *, length: int, batch_size: int
) -> Iterator[Scored]:
    """What the windows score, in their order.

    Args:
      windows: what is read.
      model: by which.
      store: of which text.
      length: T, most tokens in a window.
      batch_size: B, or as many more as fill the mesh's devices.
    """
    graph, parameters = split_model(model)
    losses_of = BatchLosses(graph, batch_size)
    pending: tuple[tuple[Window, ...], jax.Array] | None = None
    for some, batch in batches_of(windows, store, length=length, batch_size=losses_of.batch_size):
        losses = losses_of(parameters, batch)
        # Fetched one batch late: the next one is laid out and begun meanwhile.
        if pending is not None:
            yield from _scored(*pending)
        pending = some, losses
    if pending is not None:
        yield from _scored(*pending)


def score_overlapping(
    model: LanguageModel, store: TokenStore, *, length: int, stride: int, batch_size: int
) -> Iterator[Scored]:
    """All targets of all documents, each scored once, in windows of `length` that go on by `stride`."""
    windows = (
        window
        for document in range(len(store))
        for window in overlapping_windows(store, document, length=length, stride=stride)
    )
    return score_windows(windows, model, store, length=length, batch_size=batch_size)


def _scored(windows: tuple[Window, ...], losses: jax.Array) -> Iterator[Scored]:
    for window, row in zip(windows, np.asarray(losses), strict=False):
        position = window.scored - window.start
        yield Scored(window.document, window.scored, position, row[position : window.end - window.start])


def window_bytes(model: LanguageModel, store: TokenStore, length: int) -> int:
    """Bytes of the caches after the longest window that a text fills, if a token were to follow it."""
    longest = max(num_pairs(store, document) for document in range(len(store)))
    return cache_bytes(model, min(length, longest), Storage())

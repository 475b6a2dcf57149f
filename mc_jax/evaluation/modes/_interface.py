"""What a mode of evaluation is: which targets it scores, each after which context.

Shapes: B windows of a batch, T tokens.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mc_jax.caching import Storage
from mc_jax.data.store import TokenStore
from mc_jax.nn import LanguageModel
from mc_jax.nn.mixer import MixerCache
from mc_jax.parallel.rules import size_of


class Scored(NamedTuple):
    """Neighbouring targets of a document, with what they cost."""

    document: int
    """Which."""
    place: int
    """The first one's place in its document."""
    position: int
    """Tokens before it in the context from which it was predicted, its own input not counted."""
    nats: np.ndarray
    """Loss of each target in nats, float32."""


class Mode(Protocol):
    """How a text is read to be scored."""

    name: str

    @property
    def first(self) -> int:
        """The place in a document from which on every target is scored, once."""
        ...

    @property
    def edges(self) -> tuple[int, ...]:
        """Positions at which buckets begin, and where the last ends; empty: there is one bucket."""
        ...

    def settings(self) -> dict[str, Any]:
        """What a result must tell, as JSON values."""
        ...

    def cache_bytes(self, model: LanguageModel, store: TokenStore) -> int:
        """Bytes of all that a model keeps of one sequence between tokens, at the longest that is read."""
        ...

    def read(self, model: LanguageModel, store: TokenStore, batch_size: int) -> Iterator[Scored]:
        """Score a store's documents, `batch_size` windows or documents at a time.

        All processes of a mesh, if there is one, must go through it alike.
        """
        ...


def cache_bytes(model: LanguageModel, length: int, storage: Storage) -> int:
    """Bytes of a model's caches with places for a sequence of `length` tokens; nothing is computed."""
    rows = size_of("batch")  # at least one a device
    caches = jax.eval_shape(lambda: model.begin(rows, length, storage))
    # What independent segments start from is the model's, and not a sequence's.
    caches = [
        dataclasses.replace(cache, memory=dataclasses.replace(cache.memory, initial=None))
        if isinstance(cache, MixerCache)
        else cache
        for cache in caches
    ]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches)) // rows

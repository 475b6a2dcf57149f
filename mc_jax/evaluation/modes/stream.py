"""Mode "stream": whole documents, however long, read in chunks that hand on state and cache.

Shapes: B documents of a batch, T tokens of a chunk.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mc_jax.caching import Storage
from mc_jax.data.rows import empty_example
from mc_jax.data.store import TokenStore
from mc_jax.data.windows import Window, example_of, num_pairs
from mc_jax.evaluation.modes._interface import Scored, cache_bytes
from mc_jax.facts import AGGREGATION_FACTS
from mc_jax.nn import LanguageModel
from mc_jax.parallel import has_mesh
from mc_jax.training.step import Parameters, losses_of_features, merge_model, split_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """No window: every target is predicted from all of its document before it, as in generation.

    The device holds one chunk and the caches. These stay as they are with `max_cached` places, or where
    nothing is cached; otherwise they have a place for each segment of the longest document, and an attention
    layer's for each of its tokens.
    """

    chunk: int
    """Tokens read at once, whole segments; no result depends on it."""
    storage: Storage = dataclasses.field(default_factory=Storage)
    """How cached memories are kept."""
    name = "stream"
    first = 0
    edges = ()

    def settings(self) -> dict[str, Any]:
        """The storage, where it is not the plain one."""
        kept = dataclasses.asdict(self.storage)
        plain = dataclasses.asdict(Storage())
        return {name: value for name, value in kept.items() if value != plain[name]}

    def cache_bytes(self, model: LanguageModel, store: TokenStore) -> int:
        """The caches of the longest document."""
        longest = max(num_pairs(store, document) for document in range(len(store)))
        return cache_bytes(model, self._capacity(model, longest), self.storage)

    def read(self, model: LanguageModel, store: TokenStore, batch_size: int) -> Iterator[Scored]:
        """Score all documents, those of about one length together.

        Raises:
          ValueError: there is a mesh, or the model cannot keep its memories so.
        """
        if has_mesh():
            raise ValueError("mode 'stream' reads on one device; leave the mesh before")
        self._must_have_places(model, store)
        graph, parameters = split_model(model)
        batch_size = min(batch_size, len(store))  # a row without a document costs as much as one with
        begin, extend = _compiled(graph, batch_size, self.storage)
        by_length = sorted(range(len(store)), key=lambda document: num_pairs(store, document))
        for documents in itertools.batched(by_length, batch_size):
            longest = num_pairs(store, documents[-1])
            caches = begin(parameters, self._capacity(model, longest))
            pending: tuple[list[Window], jax.Array] | None = None
            for start in range(0, longest, self.chunk):
                windows = [self._window(store, document, start) for document in documents]
                losses, caches = extend(parameters, caches, self._batch(store, windows, batch_size))
                # Fetched one chunk late: the next one is laid out and begun meanwhile.
                if pending is not None:
                    yield from _scored(*pending)
                pending = windows, losses
            assert pending is not None
            yield from _scored(*pending)

    def _must_have_places(self, model: LanguageModel, store: TokenStore) -> None:
        places = self.storage.max_cached
        caches = AGGREGATION_FACTS[model.config.aggregation].reads_cache
        if places is None or self.storage.when_full != "error" or not caches:
            return
        for document in range(len(store)):
            pairs = num_pairs(store, document)
            needed = (pairs - 1) // model.config.segment_length
            if needed > places:
                raise ValueError(
                    f"max_cached {places} is less than the {needed} segments before the last token of a "
                    f"document of {pairs}; set it higher, or when_full to 'drop-oldest'"
                )

    def _capacity(self, model: LanguageModel, longest: int) -> int:
        """Tokens that there are places for: a power of two of segments, so that few programs are compiled."""
        segments = -(-longest // model.config.segment_length)
        return model.config.segment_length * max(1 << (segments - 1).bit_length(), self._segments(model))

    def _segments(self, model: LanguageModel) -> int:
        return self.chunk // model.config.segment_length

    def _window(self, store: TokenStore, document: int, start: int) -> Window:
        """A document's chunk; an empty one after its end."""
        end = max(start, min(start + self.chunk, num_pairs(store, document)))
        return Window(document, start, start, end)

    def _batch(self, store: TokenStore, windows: list[Window], size: int) -> dict[str, np.ndarray]:
        padding = empty_example(store, self.chunk)
        rows = [
            example_of(store, window, self.chunk) if window.end > window.start else padding
            for window in windows
        ]
        rows += [padding] * (size - len(rows))
        return {name: np.stack([row[name] for row in rows]) for name in padding}


@functools.lru_cache(maxsize=16)  # a sweep measures one model in many ways
def _compiled(graph: nnx.GraphDef, batch_size: int, storage: Storage) -> tuple[Callable, Callable]:
    """From parameters and a length the first caches; from these and a batch, its losses and the next ones."""

    def begin(parameters: Parameters, length: int) -> Any:
        return merge_model(graph, parameters).begin(batch_size, length, storage)

    def extend(parameters: Parameters, caches: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
        model = merge_model(graph, parameters)
        x, caches = model.extend(batch["inputs"], caches)
        return losses_of_features(model, x, batch), caches

    return jax.jit(begin, static_argnums=1), jax.jit(extend, donate_argnums=1)


def _scored(windows: list[Window], losses: jax.Array) -> Iterator[Scored]:
    for window, row in zip(windows, np.asarray(losses), strict=False):
        if window.end > window.start:
            yield Scored(window.document, window.start, window.start, row[: window.end - window.start])

"""Mode "last-k": windows that score their last k targets alone, each of them after a long context."""

import dataclasses
from collections.abc import Iterator

from mc_jax.data.store import TokenStore
from mc_jax.data.windows import Window, num_pairs
from mc_jax.evaluation.modes._interface import Scored
from mc_jax.evaluation.modes._windows import score_windows, window_bytes
from mc_jax.nn import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastK:
    """What a context of a length is worth: every target has at least length - k tokens before its block.

    A document's targets from `first` on are cut into blocks of k, whatever the length, so that windows of
    all lengths score the same ones. A document's last block may be short, and reads the more context.

    Raises:
      ValueError: a k that is not in 1..length, or a `first` with too little before it.
    """

    length: int
    """Tokens in a window."""
    k: int
    """Targets that it scores, its last ones."""
    first: int
    """The place in a document where the first block begins."""
    name = "last-k"
    edges = ()

    def __post_init__(self):
        if not 1 <= self.k <= self.length:
            raise ValueError(f"last-k {self.k} is not in 1 to the context length, {self.length}; set it so")
        if self.first < self.length - self.k:
            raise ValueError(
                f"from target {self.first} on there is less context than the {self.length - self.k} tokens "
                f"of a window of {self.length}; set first to {self.length - self.k} or more"
            )

    def settings(self) -> dict[str, int]:
        """The window, what it scores, and from where on."""
        return {"context_length": self.length, "last_k": self.k, "first": self.first}

    def cache_bytes(self, model: LanguageModel, store: TokenStore) -> int:
        """The caches after a window."""
        return window_bytes(model, store, self.length)

    def read(self, model: LanguageModel, store: TokenStore, batch_size: int) -> Iterator[Scored]:
        """Score all documents with more than `first` targets."""
        windows = (window for document in range(len(store)) for window in self._cut(store, document))
        return score_windows(windows, model, store, length=self.length, batch_size=batch_size)

    def _cut(self, store: TokenStore, document: int) -> Iterator[Window]:
        pairs = num_pairs(store, document)
        for scored in range(self.first, pairs, self.k):
            end = min(scored + self.k, pairs)
            yield Window(document, max(end - self.length, 0), scored, end)

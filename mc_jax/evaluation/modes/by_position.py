"""Mode "by-position": loss by how many tokens stand before a target in its context."""

import dataclasses
import itertools
from collections.abc import Iterator

from mc_jax.data.store import TokenStore
from mc_jax.evaluation.modes._interface import Scored
from mc_jax.evaluation.modes._windows import score_overlapping, window_bytes
from mc_jax.nn import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByPosition:
    """Windows side by side, in which every target is scored once, and told apart by its position in them.

    Buckets are as long as what is before them: 0, 1, 2 to 3, 4 to 7, and so on. A document's last window is
    as long as the others, and scores what no other did.
    """

    length: int
    """Tokens in a window."""
    name = "by-position"
    first = 0

    @property
    def edges(self) -> tuple[int, ...]:
        """0, 1, 2, 4, 8, ..., length."""
        powers = itertools.takewhile(lambda edge: edge < self.length, (1 << n for n in itertools.count()))
        return (0, *powers, self.length)

    def settings(self) -> dict[str, int]:
        """The window, as long as its stride."""
        return {"context_length": self.length, "stride": self.length}

    def cache_bytes(self, model: LanguageModel, store: TokenStore) -> int:
        """The caches after a window."""
        return window_bytes(model, store, self.length)

    def read(self, model: LanguageModel, store: TokenStore, batch_size: int) -> Iterator[Scored]:
        """Score all documents."""
        return score_overlapping(model, store, length=self.length, stride=self.length, batch_size=batch_size)

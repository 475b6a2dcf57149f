"""Mode "windows": overlapping windows of one length, in which every target is scored once."""

import dataclasses
from collections.abc import Iterator

from mc_jax.data.store import TokenStore
from mc_jax.data.windows import check_stride
from mc_jax.evaluation.modes._interface import Scored
from mc_jax.evaluation.modes._windows import score_overlapping, window_bytes
from mc_jax.nn import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """The mode with which a training measures its held-out text.

    The targets are all there are, whatever the length; early ones of a window have less context.

    Raises:
      ValueError: a stride that is not in 1..length.
    """

    length: int
    """Tokens in a window."""
    stride: int
    """Targets scored in each but a document's first window, its last ones."""
    name = "windows"
    first = 0
    edges = ()

    def __post_init__(self):
        check_stride(self.stride, self.length)

    def settings(self) -> dict[str, int]:
        """The window and its stride."""
        return {"context_length": self.length, "stride": self.stride}

    def cache_bytes(self, model: LanguageModel, store: TokenStore) -> int:
        """The caches after a window."""
        return window_bytes(model, store, self.length)

    def read(self, model: LanguageModel, store: TokenStore, batch_size: int) -> Iterator[Scored]:
        """Score all documents."""
        return score_overlapping(model, store, length=self.length, stride=self.stride, batch_size=batch_size)

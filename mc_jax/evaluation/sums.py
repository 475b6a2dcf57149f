"""Exact sums over scored targets, what follows from them, and how far it may be off.

Shapes: U units (documents or blocks of text), P buckets.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from mc_jax.data.store import TokenStore
from mc_jax.data.windows import num_pairs

_LARGEST_EXPONENT = 709.0  # of a float
# Below it the spread of so few documents says little of others; from it on they are the units.
_FEWEST_DOCUMENTS = 30
_BLOCKS = 100
_SHORTEST_BLOCK = 16


class Estimate(NamedTuple):
    """A figure, and its standard error over the units of the text."""

    value: float
    standard_error: float | None
    """None where there are fewer than two units."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """What a text is cut into to tell how a figure varies: whole documents, or blocks where they are few."""

    block_length: int | None
    """Targets in a block, counted from a document's start; None: documents are the units."""
    first: np.ndarray
    """Each document's first unit, int64 [documents + 1]."""

    def __len__(self) -> int:
        return int(self.first[-1])

    def of(self, document: int, places: np.ndarray) -> np.ndarray:
        """The units of a document's targets, by their places in it, int64."""
        within = 0 if self.block_length is None else places // self.block_length
        return self.first[document] + np.zeros_like(places) + within

    def describe(self, used: int) -> str:
        """The units in words, `used` of which hold scored targets."""
        if self.block_length is None:
            return f"{used:,} documents"
        return f"{used:,} blocks of {self.block_length:,} tokens"


def units_of(store: TokenStore, first: int = 0) -> Units:
    """The units of a text whose documents are scored from their `first` target on."""
    scored = np.maximum(np.diff(store.offsets) + 1 - first, 0)
    documents = len(store)
    if np.count_nonzero(scored) >= _FEWEST_DOCUMENTS:
        return Units(block_length=None, first=np.arange(documents + 1, dtype=np.int64))
    length = max(_SHORTEST_BLOCK, -(-int(scored.sum()) // _BLOCKS))
    blocks = [-(-num_pairs(store, document) // length) for document in range(documents)]
    return Units(block_length=length, first=np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """Nats of the scored targets and what they are counted over, by unit and bucket."""

    nats: np.ndarray
    """float64 [U, P]."""
    tokens: np.ndarray
    """Scored targets, int64 [U, P]."""
    bytes: np.ndarray
    """UTF-8 bytes that they stand for, int64 [U, P]."""
    words: np.ndarray
    """Words of the text that begin in them, int64 [U, P]."""
    units: Units
    """What the units are."""

    def bucket(self, index: int) -> "Sums":
        """The sums of one bucket, P = 1."""
        parts = {name: getattr(self, name)[:, index : index + 1] for name in COUNTED}
        return dataclasses.replace(self, **parts)

    def total(self, name: str) -> float:
        """All of "nats", "tokens", "bytes" or "words"."""
        return getattr(self, name).sum().item()

    def by_document(self, name: str) -> np.ndarray:
        """The same, document by document [documents]."""
        padded = np.append(getattr(self, name).sum(axis=1), 0)  # the last document may have no unit
        return np.add.reduceat(padded, self.units.first)[:-1]

    @property
    def over(self) -> str:
        """What standard errors are over, in words."""
        return self.units.describe(int(np.count_nonzero(self.tokens.sum(axis=1))))

    def figures(self) -> dict[str, Estimate]:
        """Loss (nats per token), perplexity, bits_per_byte and word_perplexity, NaN where nothing is counted.

        A word's perplexity is exp(nats / words of the text), as lm-eval defines word_perplexity.
        """
        loss, per_byte, per_word = (self._ratio(name) for name in ("tokens", "bytes", "words"))
        return {
            "loss": loss,
            "perplexity": _exponential(loss),
            "bits_per_byte": _in_bits(per_byte),
            "word_perplexity": _exponential(per_word),
        }

    def _ratio(self, name: str) -> Estimate:
        return _ratio(self.nats.sum(axis=1), getattr(self, name).sum(axis=1), self.tokens.sum(axis=1) > 0)


COUNTED = ("nats", "tokens", "bytes", "words")
"""The arrays of `Sums`."""


def difference(first: Sums, second: Sums) -> dict[str, Estimate]:
    """How much more `first` has than `second` on the same targets, unit by unit: loss and bits_per_byte.

    The standard error is that of the paired difference: what makes a text hard for both cancels.

    Raises:
      ValueError: they are not of the same targets.
    """
    for name in ("tokens", "bytes"):
        one, other = (getattr(sums, name).sum(axis=1) for sums in (first, second))
        if not np.array_equal(one, other):
            raise ValueError(
                "the two results are not of the same targets; measure both on the same text, in the same "
                "mode, and with last-k from the same --first on"
            )
    nats = first.nats.sum(axis=1) - second.nats.sum(axis=1)
    tokens, text = first.tokens.sum(axis=1), first.bytes.sum(axis=1)
    return {
        "loss": _ratio(nats, tokens, tokens > 0),
        "bits_per_byte": _in_bits(_ratio(nats, text, tokens > 0)),
    }


def _ratio(numerators: np.ndarray, denominators: np.ndarray, used: np.ndarray) -> Estimate:
    """Sum over sum, over the used of U units, and the standard error of such a ratio, linearised.

    (Cochran, Sampling Techniques, 1977, section 6.3.)
    """
    total, count = float(denominators.sum()), int(np.count_nonzero(used))
    if total == 0:
        return Estimate(math.nan, None)
    value = float(numerators.sum()) / total
    if count < 2:
        return Estimate(value, None)
    residuals = numerators - value * denominators
    return Estimate(value, math.sqrt(count / (count - 1) * float(np.sum(residuals**2))) / total)


def _exponential(estimate: Estimate) -> Estimate:
    value, error = estimate
    if value >= _LARGEST_EXPONENT:
        return Estimate(math.inf, None)
    return Estimate(math.exp(value), None if error is None else math.exp(value) * error)


def _in_bits(estimate: Estimate) -> Estimate:
    value, error = estimate
    return Estimate(value / math.log(2), None if error is None else error / math.log(2))

"""What an evaluation found, with all that must be known to find it again."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mc_jax.evaluation.origin import Origin
from mc_jax.evaluation.sums import COUNTED, Estimate, Sums

BEGINNING = (
    "a document is read from a separator on, and the separator after its last token is a target; "
    "a window that begins within a document begins with its own tokens"
)
"""What stands where others have a token for the beginning of a sequence."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """A run's result on a text."""

    origin: Origin
    """The weights, how they were read, and the text."""
    mode: str
    """How the text was read."""
    settings: Mapping[str, Any]
    """The mode's: window, stride."""
    sums: Sums
    """What everything else follows from."""
    edges: tuple[int, ...]
    """Positions at which buckets begin, and where the last ends; empty: there is one bucket."""
    cache_bytes: int
    """Bytes of all that the model keeps of one sequence between tokens, at the longest that was read."""
    seconds: float
    """What it took, compiling included."""

    @property
    def documents(self) -> int:
        """How many have scored targets."""
        return int(np.count_nonzero(self.sums.by_document("tokens")))

    def figures(self) -> dict[str, float]:
        """Loss, perplexity, bits_per_byte, word_perplexity, each with a standard error; what was counted."""
        found = _flat(self.sums.figures())
        found |= {name: self.sums.total(name) for name in ("tokens", "bytes", "words")}
        return found | {"documents": self.documents}

    def buckets(self) -> Iterator[dict[str, Any]]:
        """The same for each range of positions, where the mode tells them apart."""
        for index, (start, stop) in enumerate(itertools.pairwise(self.edges)):
            sums = self.sums.bucket(index)
            yield {"from": start, "to": stop - 1, "tokens": sums.total("tokens")} | _flat(sums.figures())

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, the sums of every unit included: a difference can be made of two."""
        return {
            **self.origin.to_json(),
            "mode": self.mode,
            **self.settings,
            **self.figures(),
            "nats": self.sums.total("nats"),
            "standard_error_over": self.sums.over,
            "beginning": BEGINNING,
            **({"by_position": list(self.buckets())} if self.edges else {}),
            "units": {
                "block_length": self.sums.units.block_length,
                **{name: getattr(self.sums, name).sum(axis=1).tolist() for name in COUNTED},
            },
            "cache_bytes": self.cache_bytes,
            "seconds": self.seconds,
        }


def _flat(figures: Mapping[str, Estimate]) -> dict[str, float]:
    """Each figure, and beside it its standard error, if it has one."""
    flat: dict[str, float] = {}
    for name, (value, error) in figures.items():
        flat[name] = value
        if error is not None:
            flat[f"{name}_standard_error"] = error
    return flat

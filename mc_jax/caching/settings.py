"""The static settings of Memory Caching: one hashable value that a forward pass and its cache share."""

import dataclasses

from mc_jax.caching.aggregations import AGGREGATIONS
from mc_jax.memories import MEMORIES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a row of tokens is written, cached and read; names are keys of the registries.

    Raises:
      ValueError: a name that is not known, or lengths that do not fit.
    """

    memory: str = "linear"
    aggregation: str = "gated"
    segment_length: int = 256
    segment_init: str = "checkpoint"
    chunk_length: int = 64
    implementation: str | None = None

    def __post_init__(self):
        _must_be_in("memory", self.memory, MEMORIES)
        _must_be_in("aggregation", self.aggregation, AGGREGATIONS)
        _must_be_in("segment_init", self.segment_init, ("checkpoint", "independent"))
        if self.segment_length % self.chunk_length:
            raise ValueError(
                f"chunk_length {self.chunk_length} does not divide segment_length {self.segment_length}; "
                "set segment_length to a multiple of it"
            )


def _must_be_in(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")

"""The static settings of Memory Caching: one hashable value that a forward pass and its cache share."""

import dataclasses
from collections.abc import Iterable

from mc_jax.caching.aggregations import AGGREGATIONS
from mc_jax.memories import MEMORIES
from pallas_kernels._branch import BRANCHES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a row of tokens is written, cached and read; see `memory_caching` for the fields.

    Raises:
      ValueError: a name that is not known, lengths that do not fit, a setting that would have no effect.
    """

    memory: str = "linear"
    aggregation: str = "gated"
    segment_length: int = 256
    segmentation: str = "constant"
    segment_init: str = "checkpoint"
    chunk_length: int = 64
    top_k: int | None = None
    router_blocks: int = 1
    selected_read: str | None = None
    branch: str | None = None
    implementation: str | None = None

    def __post_init__(self):
        _must_be_in("memory", self.memory, MEMORIES)
        _must_be_in("aggregation", self.aggregation, AGGREGATIONS)
        _must_be_in("segmentation", self.segmentation, ("constant", "logarithmic"))
        _must_be_in("segment_init", self.segment_init, ("checkpoint", "independent"))
        _must_be_in("branch", self.branch, (None, *BRANCHES))
        _must_be_in("selected_read", self.selected_read, (None, "dense", "grouped"))
        for name in ("segment_length", "chunk_length", "router_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; set it to 1 or more")
        for name in ("chunk_length", "router_blocks"):
            if self.segment_length % getattr(self, name):
                raise ValueError(
                    f"{name} {getattr(self, name)} does not divide segment_length {self.segment_length}; "
                    "set segment_length to a multiple of it"
                )
        aggregation = AGGREGATIONS[self.aggregation]
        if aggregation.uses_top_k and (self.top_k is None or self.top_k < 1):
            raise ValueError(
                f"aggregation {self.aggregation!r} reads top_k cached memories and top_k is {self.top_k}; "
                "set top_k to 1 or more"
            )
        if not aggregation.uses_top_k and self.top_k is not None:
            raise ValueError(f"top_k has no effect with aggregation {self.aggregation!r}; leave it out")
        if self.router_blocks > 1 and not aggregation.uses_router:
            raise ValueError(
                f"router_blocks has no effect with aggregation {self.aggregation!r}; leave it out"
            )
        if self.selected_read is not None and aggregation.select is None:
            raise ValueError(
                f"selected_read has no effect with aggregation {self.aggregation!r}; leave it out"
            )
        if self.segmentation == "logarithmic":
            self._check_logarithmic()

    def _check_logarithmic(self) -> None:
        if self.aggregation != "gated":
            raise ValueError(
                f"segmentation 'logarithmic' is defined with aggregation 'gated', not {self.aggregation!r}; "
                "set aggregation to 'gated' or segmentation to 'constant'"
            )
        if self.router_blocks > 1:
            raise ValueError("router_blocks needs segmentation 'constant'; set router_blocks to 1")
        if self.segment_init == "independent" and self.memory != "linear":
            raise ValueError(
                f"independent segments of memory {self.memory!r} cannot be merged into groups; "
                "set segment_init to 'checkpoint' or memory to 'linear'"
            )


def _must_be_in(name: str, value: str | None, choices: Iterable[str | None]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(map(str, choices))}")

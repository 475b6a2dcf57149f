"""The static settings of Memory Caching: one hashable value that a forward pass and its cache share."""

import dataclasses
from collections.abc import Iterable

from mc_jax.caching.aggregations import AGGREGATIONS
from mc_jax.facts import AGGREGATION_FACTS, MEMORY_FACTS, AggregationFacts, names_with
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
        if self.about.top_k == "never" and self.top_k is not None:
            raise ValueError(f"top_k has no effect with aggregation {self.aggregation!r}; leave it out")
        lacks_top_k = self.about.top_k == "always" and self.top_k is None
        if lacks_top_k or (self.top_k is not None and self.top_k < 1):
            raise ValueError(
                f"aggregation {self.aggregation!r} reads top_k cached memories and top_k is {self.top_k}; "
                "set top_k to 1 or more"
            )
        if self.router_blocks > 1 and not self.about.uses_router:
            raise ValueError(
                f"router_blocks has no effect with aggregation {self.aggregation!r}; leave it out"
            )
        if self.selected_read is not None and not self.selects:
            without = "" if AGGREGATIONS[self.aggregation].select is None else " without top_k"
            raise ValueError(
                f"selected_read has no effect with aggregation {self.aggregation!r}{without}; leave it out"
            )
        if self.segmentation == "logarithmic":
            self._check_logarithmic()

    @property
    def about(self) -> AggregationFacts:
        """What is so of the aggregation."""
        return AGGREGATION_FACTS[self.aggregation]

    @property
    def selects(self) -> bool:
        """Whether a token's few states are known by their places, so that no other need be read."""
        return self.top_k is not None and AGGREGATIONS[self.aggregation].select is not None

    def _check_logarithmic(self) -> None:
        if not self.about.reads_groups:
            fits = names_with(AGGREGATION_FACTS, "reads_groups")
            raise ValueError(
                f"segmentation 'logarithmic' is defined with aggregation {fits}, not {self.aggregation!r}; "
                f"set aggregation to {fits} or segmentation to 'constant'"
            )
        if self.router_blocks > 1:
            raise ValueError("router_blocks needs segmentation 'constant'; set router_blocks to 1")
        if self.segment_init == "independent" and not MEMORY_FACTS[self.memory].can_merge:
            raise ValueError(
                f"independent segments of memory {self.memory!r} cannot be merged into groups; "
                f"set segment_init to 'checkpoint' or memory to {names_with(MEMORY_FACTS, 'can_merge')}"
            )


def _must_be_in(name: str, value: str | None, choices: Iterable[str | None]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(map(str, choices))}")

"""What is so of each memory and each aggregation, by name: what settings, models and plans all ask.

Their functions on arrays have the same names, in `mc_jax.memories.MEMORIES` and
`mc_jax.caching.aggregations.AGGREGATIONS`.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """A memory, as settings, plans and costs see it."""

    may_be_mlp: bool = False
    """Its state may be an MLP, so that `memory_depth` chooses: 1 a matrix, 2 an MLP."""
    takes_gradients: bool = False
    """Matrices too are written by gradients at a chunk's first state, so that a chunk holds one document."""
    writes_errors: bool = False
    """What is written depends on what the memory recalls of the key, which takes a read more."""
    has_momentum: bool = False
    """The online state has a momentum as large as its weights."""
    can_merge: bool = False
    """Independent segments' states, each decayed, add up to the state of all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AggregationFacts:
    """An aggregation, as settings, plans and costs see it."""

    reads_cache: bool = True
    """Cached memories are read at all."""
    uses_router: bool = False
    """The gates depend on scores; if not, there is no router."""
    top_k: Literal["never", "optional", "always"] = "never"
    """Whether few cached memories are read: "optional" is all of them where top_k is None."""
    can_anneal: bool = False
    """Training may go from reading all cached memories to top_k, which is then traced."""
    mixes_weights: bool = False
    """The gates weigh the memories' weights, and not what is read from them."""
    has_null: bool = False
    """The online memory is read whole; the softmax weighs cached ones with a null, which reads nothing."""
    reads_groups: bool = False
    """It is the softmax over all memories that logarithmic segmentation takes over its groups."""


MEMORY_FACTS: dict[str, MemoryFacts] = {
    "linear": MemoryFacts(can_merge=True),
    "swla": MemoryFacts(),
    "delta": MemoryFacts(writes_errors=True),
    "dla": MemoryFacts(may_be_mlp=True),
    "titans": MemoryFacts(may_be_mlp=True, takes_gradients=True, writes_errors=True, has_momentum=True),
}
AGGREGATION_FACTS: dict[str, AggregationFacts] = {
    "none": AggregationFacts(reads_cache=False),
    "residual": AggregationFacts(),
    "gated": AggregationFacts(uses_router=True, reads_groups=True),
    "soup": AggregationFacts(uses_router=True, mixes_weights=True),
    "sparse": AggregationFacts(uses_router=True, top_k="always", can_anneal=True),
    "average": AggregationFacts(top_k="always"),
    "null": AggregationFacts(uses_router=True, top_k="optional", can_anneal=True, has_null=True),
}

if TYPE_CHECKING:  # no checker of types knows the names of a table: `validate` does
    MemoryName = str
    AggregationName = str
else:
    MemoryName = Literal[*MEMORY_FACTS]
    AggregationName = Literal[*AGGREGATION_FACTS]


def names_with(facts: Mapping[str, MemoryFacts] | Mapping[str, AggregationFacts], fact: str) -> str:
    """The names of which a fact is true, as a message offers them: "'dla' or 'titans'"."""
    return " or ".join(repr(name) for name, known in facts.items() if getattr(known, fact))

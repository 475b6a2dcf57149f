"""The recurrences, by name. A new memory is one file here and one entry in `MEMORIES`."""

from mc_jax.memories._interface import (
    AffineMemory,
    Coefficients,
    DecodableMemory,
    Family,
    Layout,
    Memory,
    MemoryRun,
    MixableMemory,
    Response,
)
from mc_jax.memories.delta import DELTA
from mc_jax.memories.dla import DLA
from mc_jax.memories.linear import LINEAR
from mc_jax.memories.swla import SWLA
from mc_jax.memories.titans import TITANS
from pallas_kernels._state import Weights

MEMORIES: dict[str, Family] = {
    "linear": LINEAR,
    "swla": SWLA,
    "delta": DELTA,
    "dla": DLA,
    "titans": TITANS,
}


def memory_for(name: str, weights: Weights | None) -> Memory:
    """The memory `name` for states like `weights`: a pair is an MLP, an array or None a matrix.

    Raises:
      ValueError: a pair for a memory that is a matrix by its rule.
    """
    family = MEMORIES[name]
    if not isinstance(weights, tuple):
        return family.matrix
    if family.mlp is None:
        raise ValueError(f"memory {name!r} is a matrix; give one array as initial_state, not a pair")
    return family.mlp


__all__ = [
    "MEMORIES",
    "AffineMemory",
    "Coefficients",
    "DecodableMemory",
    "Family",
    "Layout",
    "Memory",
    "MemoryRun",
    "MixableMemory",
    "Response",
    "memory_for",
]

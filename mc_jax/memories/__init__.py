"""The recurrences, by name. A new memory is one file here and one entry in `MEMORIES`."""

from mc_jax.memories._interface import Coefficients, Layout, Memory, MemoryRun
from mc_jax.memories.linear import LINEAR

MEMORIES: dict[str, Memory] = {
    "linear": LINEAR,
}

__all__ = ["MEMORIES", "Coefficients", "Layout", "Memory", "MemoryRun"]

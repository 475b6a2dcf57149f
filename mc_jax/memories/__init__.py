"""The recurrences, by name. A new one is one file here, an entry here, and one in `mc_jax.facts`."""

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


def memory_for(name: str, weights: Weights | None, branch: str | None = None) -> Memory:
    """The memory `name` for states like `weights`: a pair is an MLP, an array or None a matrix.

    `branch` is an MLP's, "bounded" or "plain"; None: "bounded".

    Raises:
      ValueError: a pair for a memory that is a matrix by its rule, or a branch for a matrix.
    """
    family = MEMORIES[name]
    if not isinstance(weights, tuple):
        if branch is not None:
            raise ValueError(
                f"branch {branch!r} has no effect on memory {name!r} whose state is a matrix; leave it out, "
                "or give an MLP's pair as initial_state"
            )
        return family.matrix
    if family.mlp is None:
        raise ValueError(f"memory {name!r} is a matrix; give one array as initial_state, not a pair")
    return family.mlp("bounded" if branch is None else branch)


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

"""What settings and coefficients make of a memory, in the parallel form as in decoding."""

import jax
import jax.numpy as jnp

from mc_jax.caching.settings import Settings
from mc_jax.memories import Coefficients, Memory, MixableMemory, memory_for
from pallas_kernels._state import Weights


def memory_of(settings: Settings, coefficients: Coefficients, weights: Weights | None) -> Memory:
    """The memory by the settings' name, for states like `weights`, if it knows all the coefficients."""
    memory = memory_for(settings.memory, weights, settings.branch)
    for name, value in coefficients._asdict().items():
        if value is not None and name not in memory.coefficients:
            known = ", ".join(memory.coefficients)
            raise ValueError(f"{name} has no effect on memory {settings.memory!r}, which has {known}")
    return memory


def mixable_of(settings: Settings, memory: Memory) -> MixableMemory | None:
    """The memory, where the aggregation mixes weights and that is not the same as mixing reads."""
    return memory if settings.about.mixes_weights and isinstance(memory, MixableMemory) else None


def log_retention_of(settings: Settings, coefficients: Coefficients, shape, dtype) -> jax.Array | None:
    """Log a where segments are merged into groups, which needs their decays."""
    if settings.segmentation == "constant" or settings.segment_init == "checkpoint":
        return None
    if coefficients.retention is None:
        return jnp.zeros(shape, dtype)
    retention = coefficients.retention.astype(dtype)
    return jnp.log(jnp.maximum(retention, jnp.finfo(dtype).tiny))

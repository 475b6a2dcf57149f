"""What lies in a chip's memory during a training step."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

# Two messages of the compiler: of its first look at a program, and after it has laid it out.
_USED = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one chip."""

    parts: dict[str, int]
    """Bytes by purpose; their sum is what the step needs."""
    total: int
    """What the step needs."""
    capacity: int
    """What the chip has for programs."""
    host: int
    """What lies in the host's memory meanwhile, for this chip."""
    is_compiled: bool
    """Whether the compiler told it; if not, it is an estimate by formula."""

    @property
    def fits(self) -> bool:
        """Whether the chip has enough."""
        return self.total <= self.capacity

    @property
    def free(self) -> int:
        """What is left; negative: what is missing."""
        return self.capacity - self.total


def compiled_memory(compiled: jax.stages.Compiled, state: Any, batch: Any, capacity: float) -> Memory:
    """Return what the compiler has laid out.

    Args:
      compiled: the step.
      state: its training state, shapes with shardings.
      batch: likewise.
      capacity: bytes of the chip.
    """
    stats = compiled.memory_analysis()
    assert stats is not None
    held = state_parts(state) | {"batch": chip_bytes(batch)}
    returned = stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts = held | {
        "arguments' padding": stats.argument_size_in_bytes - sum(held.values()),
        "results that take no argument's place": returned,
        "gradients, activations, temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    return Memory(
        parts={name: size for name, size in parts.items() if size},
        total=sum(parts.values()),
        capacity=int(capacity),
        host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
        is_compiled=True,
    )


def refused_memory(message: str, state: Any, batch: Any) -> Memory | None:
    """Return what the compiler said it would have needed when it refused; None: that is not what it said."""
    found = _used(message)
    if found is None:
        return None
    used, capacity = found
    held = state_parts(state) | {"batch": chip_bytes(batch)}
    rest = used - sum(held.values())
    return Memory(
        parts=held | {"gradients, activations, temporaries, program": rest},
        total=used,
        capacity=capacity,
        host=0,
        is_compiled=True,
    )


def capacity_of(device: jax.Device, otherwise: float) -> int:
    """Return how many bytes of its memory a chip has for programs, which is less than the vendor's figure.

    The compiler tells when it refuses a program, such as one that takes 512 GiB.

    Args:
      device: of a topology that need not be here.
      otherwise: where it says nothing.
    """
    mesh = jax.sharding.Mesh([device], "chip", axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P())
    huge = jax.ShapeDtypeStruct((2**20, 2**17), jnp.float32, sharding=place)
    try:
        jax.jit(jnp.sum).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = _used(str(error))
        return int(otherwise) if found is None else found[1]
    return int(otherwise)


def _used(message: str) -> tuple[int, int] | None:
    """Bytes that the compiler says a program needs, and that the chip has."""
    found = next((match for pattern in _USED if (match := pattern.search(message))), None)
    if found is None:
        return None
    used, capacity = (int(float(found[n]) * _UNITS[found[n + 1]]) for n in (1, 3))
    return used, capacity


def state_parts(state: Any) -> dict[str, int]:
    """Bytes of the weights and of the optimizer's state on one chip."""
    return {
        "weights": chip_bytes(state.parameters),
        "optimizer state": chip_bytes((state.optimizer, state.step)),
    }


def chip_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device, by their shardings; without those, all of them."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total

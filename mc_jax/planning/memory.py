"""What lies in a chip's memory during a training step."""

import dataclasses
import math
import re
from typing import Any

import jax

_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one chip."""

    parts: dict[str, int]
    """By what they are for; their sum is what the step needs."""
    total: int
    """What the step needs."""
    capacity: int
    """What the chip has for programs."""
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
        is_compiled=True,
    )


def refused_memory(message: str, state: Any, batch: Any) -> Memory | None:
    """Return what the compiler said it would have needed when it refused; None: that is not what it said."""
    found = _USED.search(message)
    if found is None:
        return None
    used, capacity = (int(float(found[n]) * _UNITS[found[n + 1]]) for n in (1, 3))
    held = state_parts(state) | {"batch": chip_bytes(batch)}
    rest = used - sum(held.values())
    return Memory(
        parts=held | {"gradients, activations, temporaries, program": rest},
        total=used,
        capacity=capacity,
        is_compiled=True,
    )


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

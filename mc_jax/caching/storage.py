"""How cached memories are kept: in how many places, as which numbers, in which memory of the machine.

Shapes: B batch, N places, H heads, k states that a token selects; `...` of a state's weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compute_on import compute_on

from pallas_kernels._state import Weights

type Packed = Any
"""`Weights` with each array in the storage's dtype, or an `Int8` in its place."""

_WHEN_FULL = ("error", "drop-oldest")
_STATE_DTYPES = (None, "float32", "bfloat16", "int8")
_PLACES = ("device", "host")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """How a `Cache` keeps the memories that decoding will read.

    Raises:
      ValueError: a value that is not known.
    """

    max_cached: int | None = None
    """Places for cached memories; None: as many as there are, or as a caller who knows the length needs."""
    when_full: str = "error"
    """When all places are taken: "error", or "drop-oldest", which forgets the oldest memory."""
    state_dtype: str | None = None
    """States' numbers: "float32", "bfloat16", or "int8" with a scale for each matrix; None: as computed."""
    place: str = "device"
    """The memory of the states: "device", or "host", from which sparse reads fetch the selected ones."""

    def __post_init__(self):
        for name, known in (
            ("when_full", _WHEN_FULL),
            ("state_dtype", _STATE_DTYPES),
            ("place", _PLACES),
        ):
            if getattr(self, name) not in known:
                choices = ", ".join(map(str, known))
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose from {choices}")
        if self.max_cached is not None and self.max_cached < 1:
            raise ValueError(f"max_cached is {self.max_cached}; set it to 1 or more")

    @property
    def is_plain(self) -> bool:
        """Whether the states are arrays of floats on the device."""
        return self.place == "device" and self.state_dtype != "int8"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """Matrices [..., K, V] as whole numbers of -127 to 127 and one scale each."""

    values: jax.Array
    """[..., K, V], int8."""
    scale: jax.Array
    """[..., 1, 1], float32: what one unit is."""


def pack(states: Weights, storage: Storage) -> Packed:
    """The states as numbers of the storage's dtype."""
    if storage.state_dtype is None:
        return states
    if storage.state_dtype == "int8":
        return jax.tree.map(_quantize, states)
    return jax.tree.map(lambda leaf: leaf.astype(storage.state_dtype), states)


def unpack(packed: Packed, dtype: jnp.dtype) -> Weights:
    """The states in `dtype` again."""

    def widen(leaf: jax.Array | Int8) -> jax.Array:
        if isinstance(leaf, Int8):
            return leaf.values.astype(dtype) * leaf.scale.astype(dtype)
        return leaf.astype(dtype)

    return jax.tree.map(widen, packed, is_leaf=lambda leaf: isinstance(leaf, Int8))


def to_place(packed: Packed, storage: Storage) -> Packed:
    """Move states to where the storage has them.

    Raises:
      ValueError: this platform has no host memory apart from its device's.
    """
    if storage.place == "device":
        return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), packed)
    device = jax.devices()[0]
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(
            f"place 'host' needs pinned host memory, which {device.platform} devices do not have here; "
            "set place to 'device'"
        )
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Host), packed)


def fetch_selected(packed: Packed, indices: jax.Array, storage: Storage) -> Packed:
    """Copy the states that a token selected [B, k, H, ...], all that leaves the host's memory.

    Args:
      packed: [B, N, H, ...].
      indices: [B, H, k], int32.
      storage: where they lie.
    """
    if storage.place == "device":
        selected = _select(packed, indices)
    else:
        selected = _on_host(_select, packed, jax.device_put(indices, jax.memory.Space.Host))
        selected = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), selected)
    return jax.tree.map(lambda leaf: leaf.swapaxes(1, 2), selected)


def put_states(packed: Packed, new: Packed, place: jax.Array, write: jax.Array, storage: Storage) -> Packed:
    """Put a new state [B, H, ...] at `place` [B] of the rows where `write` [B] is true."""
    if storage.place == "device":
        return put(packed, new, place, write)
    new = jax.tree.map(lambda leaf, stored: leaf.astype(stored.dtype), new, packed)
    new, place = jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.memory.Space.Host), (new, _place_or_nowhere(place, write))
    )
    return _on_host(_scatter, packed, new, place)


def put[Tree](stored: Tree, new: Tree, place: jax.Array, write: jax.Array) -> Tree:
    """What `put_states` does, for any arrays [B, N, ...] on the device."""
    new = jax.tree.map(lambda leaf, stored: leaf.astype(stored.dtype), new, stored)
    return _scatter(stored, new, _place_or_nowhere(place, write))


def _place_or_nowhere(place: jax.Array, write: jax.Array) -> jax.Array:
    """A place outside, where a scatter writes nothing, in rows that do not write [B, 1], int32."""
    return jnp.where(write, place, jnp.iinfo(jnp.int32).max)[:, None]


# These two are written in `jax.lax`, whose every operand is named: in the host's memory an operation must
# not meet a constant of the device's, and `jax.numpy` indexing makes some.


def _select(packed: Packed, indices: jax.Array) -> Packed:
    """The states [B, H, k, ...] that indices [B, H, k] point to."""

    def gather(leaf: jax.Array) -> jax.Array:
        rest = tuple(range(3, leaf.ndim))
        numbers = jax.lax.GatherDimensionNumbers(
            offset_dims=rest,
            collapsed_slice_dims=(1,),
            start_index_map=(1,),
            operand_batching_dims=(0, 2),
            start_indices_batching_dims=(0, 1),
        )
        sizes = (1, 1, 1, *leaf.shape[3:])
        start = jax.lax.expand_dims(indices, (3,))
        return jax.lax.gather(leaf, start, numbers, sizes, mode="promise_in_bounds")

    return jax.tree.map(gather, packed)


def _scatter[Tree](stored: Tree, new: Tree, place: jax.Array) -> Tree:
    """Arrays [B, N, ...] with new [B, ...] at place [B, 1]."""

    def scatter(leaf: jax.Array, update: jax.Array) -> jax.Array:
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(1, update.ndim)),
            inserted_window_dims=(1,),
            scatter_dims_to_operand_dims=(1,),
            operand_batching_dims=(0,),
            scatter_indices_batching_dims=(0,),
        )
        return jax.lax.scatter(leaf, place, update, numbers, unique_indices=True, mode="drop")

    return jax.tree.map(scatter, stored, new)


def _on_host(function: Callable[..., Packed], *arguments: Any) -> Packed:
    """Run a function of arrays in the host's memory there, by the host's processor."""
    run = compute_on(function, compute_type="device_host", out_memory_spaces=jax.memory.Space.Host)
    return run(*arguments)


def _quantize(x: jax.Array) -> Int8:
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    # A matrix of zeros has any scale but zero.
    scale = jnp.where(largest > 0, largest / 127, jnp.ones_like(largest))
    return Int8(jnp.round(x / scale).astype(jnp.int8), scale.astype(jnp.float32))

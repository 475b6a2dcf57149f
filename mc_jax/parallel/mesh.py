"""The mesh of devices: its axes, their sizes, and whether a run fits on it."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from mc_jax.config import Config, MeshConfig

AXES = ("replica", "fsdp", "tensor")
"""From the slowest links to the fastest: of copies of the state, of its parts, of heads."""


def make_mesh(sizes: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of all devices, with automatic axes.

    Neighbours in the mesh are neighbours in the network; only "replica" goes from slice to slice.

    Args:
      sizes: of the axes; what is -1 is filled in.
      devices: which, those of a topology that is not here among them; None: all that are here.

    Raises:
      ValueError: sizes that do not take up all devices, or copies that would be split between slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    # Devices that are in no slice, as a CPU, are in one.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    replica, fsdp, tensor = _filled(sizes, len(devices), slices)
    if slices == 1:
        grid = mesh_utils.create_device_mesh((replica, fsdp, tensor), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (replica // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def must_fit(mesh: jax.sharding.Mesh, config: Config) -> None:
    """See that each device gets as many rows, heads and weights as any other.

    Raises:
      ValueError: a size that does not divide what lies along its axis.
    """
    model, training = config.model, config.training
    size = dict(mesh.shape)
    devices = size["replica"] * size["fsdp"]
    parts = devices * training.accumulation
    if training.batch_size % parts:
        cut = f" in {training.accumulation} parts" if training.accumulation > 1 else ""
        raise ValueError(
            f"training.batch_size {training.batch_size}{cut} cannot be shared evenly by mesh.replica "
            f"{size['replica']} x mesh.fsdp {size['fsdp']} = {devices} devices; set training.batch_size to "
            f"{-(-training.batch_size // parts) * parts}, or let fewer devices be seen"
        )
    for axis, name, value, cure in (
        ("fsdp", "model.model_dim", model.model_dim, "mesh.replica to what it leaves over"),
        ("tensor", "model.num_heads", model.num_heads, "mesh.fsdp to -1, which takes the rest"),
        ("tensor", "model.mlp_dim", model.mlp_dim, "mesh.fsdp to -1, which takes the rest"),
    ):
        if value % size[axis]:
            raise ValueError(
                f"mesh.{axis} {size[axis]} does not divide {name} {value}; "
                f"set mesh.{axis} to {math.gcd(value, size[axis])} and {cure}"
            )


def _filled(sizes: MeshConfig, devices: int, slices: int) -> tuple[int, int, int]:
    """Replica, fsdp, tensor."""
    replica, fsdp, tensor = sizes.replica, sizes.fsdp, sizes.tensor
    if replica == fsdp == -1:
        replica = slices
    left = max(1, devices // math.prod(size for size in (replica, fsdp, tensor) if size != -1))
    replica, fsdp = (left if size == -1 else size for size in (replica, fsdp))
    if replica * fsdp * tensor != devices:
        raise ValueError(
            f"mesh.replica {replica} x mesh.fsdp {fsdp} x mesh.tensor {tensor} is {replica * fsdp * tensor} "
            f"devices and there are {devices}; set mesh.fsdp to -1, which takes the rest, "
            f"and the others to numbers whose product divides {devices}"
        )
    if replica % slices:
        raise ValueError(
            f"mesh.replica {replica} cannot be spread over {slices} slices; set it to a multiple of {slices}"
        )
    return replica, fsdp, tensor

"""The mesh of devices: its axes, their sizes, and whether a run fits on it."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from mc_jax.config import Config, MeshConfig

AXES = ("replica", "fsdp", "sequence", "tensor")
"""From the slowest links to the fastest: of copies of the state, of its parts, of tokens, of heads."""


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
    replica, *others = filled(sizes, len(devices), slices)
    if slices == 1:
        grid = mesh_utils.create_device_mesh((replica, *others), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (replica // slices, *others), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def must_fit(mesh: jax.sharding.Mesh, config: Config) -> None:
    """See that each device gets as many rows, tokens, heads and weights as any other.

    Raises:
      ValueError: a size that does not divide what lies along its axis, or a run of tokens that is too short.
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
    _tokens_must_fit(size["sequence"], config)


def _tokens_must_fit(devices: int, config: Config) -> None:
    """See that each of the devices that share a row has a run of whole segments of it."""
    model, length = config.model, config.data.context_length
    unit, what = 1, "tokens"
    if "memory" in model.layer_pattern:
        unit, what = model.segment_length, f"whole segments of model.segment_length {model.segment_length}"
    if devices == 1:
        return
    if length % (devices * unit):
        fits = math.gcd(length // unit, devices) if length % unit == 0 else 1
        raise ValueError(
            f"data.context_length {length} cannot be cut into mesh.sequence {devices} equal runs of {what}; "
            f"set data.context_length to {-(-length // (devices * unit)) * devices * unit}, or mesh.sequence "
            f"to {fits} and mesh.fsdp to -1, which takes the rest"
        )
    if "memory" in model.layer_pattern and length // devices < model.convolution_width - 1:
        raise ValueError(
            f"the {length // devices} tokens of a device, data.context_length {length} over mesh.sequence "
            f"{devices}, are fewer than the {model.convolution_width - 1} before a token that the "
            "convolution sees; set model.convolution_width lower, or data.context_length higher"
        )


def filled(sizes: MeshConfig, devices: int, slices: int) -> tuple[int, int, int, int]:
    """Sizes of replica, fsdp, sequence, tensor, with a number in place of -1.

    Args:
      sizes: as configured.
      devices: in all.
      slices: how many of them a slow network joins.

    Raises:
      ValueError: they do not make up the devices, or the replicas cannot be spread over the slices.
    """
    replica, fsdp, within = sizes.replica, sizes.fsdp, sizes.sequence * sizes.tensor
    if replica == fsdp == -1:
        replica = slices
    left = max(1, devices // math.prod(size for size in (replica, fsdp, within) if size != -1))
    replica, fsdp = (left if size == -1 else size for size in (replica, fsdp))
    if replica * fsdp * within != devices:
        raise ValueError(
            f"mesh.replica {replica} x mesh.fsdp {fsdp} x mesh.sequence {sizes.sequence} x mesh.tensor "
            f"{sizes.tensor} is {replica * fsdp * within} devices and there are {devices}; "
            "set mesh.fsdp to -1, which takes the rest, and the others to numbers whose product divides "
            f"{devices}"
        )
    if replica % slices:
        raise ValueError(
            f"mesh.replica {replica} cannot be spread over {slices} slices; set it to a multiple of {slices}"
        )
    return replica, fsdp, sizes.sequence, sizes.tensor

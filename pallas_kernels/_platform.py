"""Which platform programs are traced for, and so which implementation of an op is the best."""

import re

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

_HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")


def _device():
    """Return a device of the mesh of `jax.set_mesh`, which need not be here, or else the default device.

    Deciding while a program is traced, and not while it is compiled, lets every implementation save for the
    gradient what it likes.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    return device if hasattr(device, "platform") else jax.devices(device)[0]


def platform() -> str:
    """Return "tpu", "gpu" or "cpu"."""
    return _device().platform


def chip() -> str:
    """Return the kind of device, such as "TPU v5 lite"."""
    return _device().device_kind


def vmem_bytes() -> int | None:
    """Return how large a TPU's VMEM is; None elsewhere, where kernels are interpreted."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if platform() == "tpu" else None


def has_wgmma() -> bool:
    """Whether the device is a Hopper GPU, of compute capability 9.0, known by its name if it is not here."""
    capability = getattr(_device(), "compute_capability", None)
    return capability == "9.0" if capability else bool(_HOPPER.search(chip()))


def has_wide_units() -> bool:
    """Whether a TPU's matrix units are 256 wide, and not 128: a product's start and end then weigh more."""
    return platform() == "tpu" and pltpu.get_tpu_info().mxu_column_size > 128


def cores() -> int:
    """Return how many cores of a TPU share a kernel's grid; 1 elsewhere."""
    return pltpu.get_tpu_info().num_cores if platform() == "tpu" else 1


def has_sparse_cores() -> bool:
    """Whether a TPU has cores beside those that compute, which can send meanwhile."""
    return platform() == "tpu" and pltpu.get_tpu_info().sparse_core is not None


def on_tpu(x: jax.Array) -> bool:
    """Whether what is made of x may be a TPU's kernel; no TPU has float64."""
    return platform() == "tpu" and x.dtype != jnp.float64

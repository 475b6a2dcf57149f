"""Lowering for GPUs that are not here: JAX needs their names alone for it."""

from collections.abc import Callable

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

HOPPER = "NVIDIA H100 80GB HBM3"
AMPERE = "NVIDIA A100-SXM4-80GB"


def on_gpu(kind: str = HOPPER):
    """Return a context in which programs are traced for one GPU of a kind."""
    device = AbstractDevice(device_kind=kind, platform="gpu", num_cores=132)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lower_for_gpu(function: Callable, *shapes, kind: str = HOPPER) -> str:
    """Return the program that XLA is given for a GPU, as text.

    Args:
      function: what is lowered.
      *shapes: its arguments, trees of arrays or `jax.ShapeDtypeStruct`.
      kind: the GPU's name.
    """
    with on_gpu(kind):
        return jax.export.export(jax.jit(function), platforms=["cuda"])(*shapes).mlir_module()

"""Compiling for TPUs that are not here: libtpu holds the compiler, and needs no chip for it."""

import functools
import importlib.util
from collections.abc import Callable

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from mc_jax._absent_tpu import quiet_libtpu

quiet_libtpu()


TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
CHIPS = tuple(TOPOLOGIES)


@functools.cache
def four(chip: str) -> list[jax.Device]:
    """Four chips side by side; skip the test where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed: scripts/setup aot")
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices


def lower_for(chip: str, function: Callable, *shapes, donate_argnums=()) -> jax.stages.Lowered:
    """Lower a function for one TPU chip, and compile nothing; skip the test where libtpu is not installed.

    Args:
      chip: one of `CHIPS`.
      function: what is lowered.
      *shapes: its arguments, trees of `jax.ShapeDtypeStruct`.
      donate_argnums: which of them it may overwrite.
    """
    mesh = jax.sharding.Mesh([four(chip)[0]], "chip", axis_types=(AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P())
    described = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )
    with jax.set_mesh(mesh):
        return jax.jit(function, donate_argnums=donate_argnums).lower(*described)

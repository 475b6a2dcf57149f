"""Training steps for TPUs that are not here."""

import jax
from tpu_topology import four

from mc_jax.config import Config, validate
from mc_jax.parallel import make_mesh
from mc_jax.planning.plan import trace_step
from mc_jax.planning.topology import read_topology


def lowered_step(config: Config, topology: str, slices: int = 1, *, vocabulary: int) -> jax.stages.Lowered:
    """The training step as `plan` compiles it; skip the test where libtpu is not installed."""
    four("v5e")
    validate(config)
    mesh = make_mesh(config.mesh, read_topology(topology, slices).devices())
    with jax.set_mesh(mesh):
        traced, *_ = trace_step(config, vocabulary)
        return traced.lower()

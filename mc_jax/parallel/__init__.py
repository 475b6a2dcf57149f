"""One model on many devices: the mesh, what lies where on it, and the memories' part of each device."""

from mc_jax.parallel.batches import local_rows, on_mesh
from mc_jax.parallel.mesh import AXES, make_mesh, must_fit
from mc_jax.parallel.rules import RULES, Rules, constrain, has_mesh, is_sharded, spec

__all__ = [
    "AXES",
    "RULES",
    "Rules",
    "constrain",
    "has_mesh",
    "is_sharded",
    "local_rows",
    "make_mesh",
    "must_fit",
    "on_mesh",
    "spec",
]

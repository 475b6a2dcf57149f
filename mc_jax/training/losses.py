"""Losses of batches of rows by a model's weights: training's forward, without a gradient.

Shapes: B rows of a batch, T tokens.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import nnx

from mc_jax.parallel import has_mesh, local_rows, on_mesh
from mc_jax.parallel.compiler import compiler_options
from mc_jax.parallel.rules import size_of
from mc_jax.training.step import Parameters, merge_model, token_losses


class BatchLosses:
    """Measures batches; compiled once for each model and T, for the current mesh if there is one.

    All processes of a mesh must call it alike.

    Args:
      graph: the model's static part.
      batch_size: B, or as many more as fill the mesh's devices: `batch_size` tells.
    """

    def __init__(self, graph: nnx.GraphDef, batch_size: int):
        self.batch_size = -(-batch_size // size_of("batch")) * size_of("batch")
        self._rows = local_rows(self.batch_size) if has_mesh() else None
        self._losses = _compiled(graph, jax.sharding.get_mesh() if has_mesh() else None)

    def __call__(self, parameters: Parameters, batch: Mapping[str, np.ndarray]) -> jax.Array:
        """Nats of each target [B, T], float32, 0 where the loss mask is; the device may still be at it."""
        if self._rows is not None:
            rows = {name: whole[self._rows] for name, whole in batch.items()}
            return self._losses(parameters, on_mesh(rows, self.batch_size))
        return self._losses(parameters, batch)


@functools.lru_cache(maxsize=16)  # a sweep measures one model in many ways
def _compiled(graph: nnx.GraphDef, mesh: jax.sharding.Mesh | None) -> Callable[..., jax.Array]:
    def losses_of(parameters: Parameters, batch: Mapping[str, jax.Array]) -> jax.Array:
        return token_losses(merge_model(graph, parameters), batch)

    # Every process reads the losses of all rows.
    whole = None if mesh is None else jax.NamedSharding(mesh, jax.P())
    return jax.jit(
        losses_of, out_shardings=whole, compiler_options=None if mesh is None else compiler_options()
    )

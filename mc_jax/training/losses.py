"""Losses of batches of rows by a model's weights: training's forward, without a gradient.

Shapes: B rows of a batch, T tokens.
"""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from mc_jax.parallel import has_mesh, local_rows, on_mesh
from mc_jax.parallel.compiler import compiler_options
from mc_jax.parallel.rules import size_of
from mc_jax.training.step import Parameters, merge_model, token_losses


class BatchLosses:
    """Measures batches; compiled once for each T, for the current mesh if there is one.

    All processes of a mesh must call it alike.

    Args:
      graph: the model's static part.
      batch_size: B, or as many more as fill the mesh's devices: `batch_size` tells.
    """

    def __init__(self, graph: nnx.GraphDef, batch_size: int):
        self.batch_size = -(-batch_size // size_of("batch")) * size_of("batch")
        self._rows = local_rows(self.batch_size) if has_mesh() else None

        def losses_of(parameters: Parameters, batch: Mapping[str, jax.Array]) -> jax.Array:
            return token_losses(merge_model(graph, parameters), batch)

        # Every process reads the losses of all rows.
        whole = jax.NamedSharding(jax.sharding.get_mesh(), jax.P()) if has_mesh() else None
        options = compiler_options() if has_mesh() else None
        self._losses = jax.jit(losses_of, out_shardings=whole, compiler_options=options)

    def __call__(self, parameters: Parameters, batch: Mapping[str, np.ndarray]) -> jax.Array:
        """Nats of each target [B, T], float32, 0 where the loss mask is; the device may still be at it."""
        if self._rows is not None:
            rows = {name: whole[self._rows] for name, whole in batch.items()}
            return self._losses(parameters, on_mesh(rows, self.batch_size))
        return self._losses(parameters, batch)

"""A step's batch on the mesh: every process reads the rows of its own devices.

It reads them whole, and of a row that several processes share places the tokens of its own devices.

Shapes: B rows of the whole batch, R rows of a process, T tokens.
"""

from collections.abc import Mapping

import jax
import numpy as np

from mc_jax.parallel.rules import spec


def local_rows(batch_size: int) -> list[int]:
    """The R rows, ascending, of a batch of B that the devices of this process hold."""
    rows = np.arange(batch_size)
    held = _sharding("batch").addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([rows[index] for index in held.values()])).tolist()


def on_mesh(batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """The batch [B, T] on the devices of the current mesh, of its `local_rows` [R, T]."""
    sharding = _sharding("batch", "tokens")
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def _sharding(*names: str) -> jax.NamedSharding:
    return jax.NamedSharding(jax.sharding.get_mesh(), spec(*names))

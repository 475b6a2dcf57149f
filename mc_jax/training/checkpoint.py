"""Checkpoints of the training state, by Orbax: written beside the training, whole or not at all."""

from typing import Any, Self

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from mc_jax.training._buckets import absolute
from mc_jax.training.step import TrainState

CHECKPOINTS_FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of a run folder; a context manager that waits for the last write.

    Of several processes each writes and reads what its devices hold, and all must make the same calls.
    """

    def __init__(self, run_dir: epath.Path, *, every: int = 1, keep: int | None = None):
        """Open, and make where missing, the checkpoints of a run.

        Args:
          run_dir: the run's folder.
          every: steps between saves.
          keep: how many of the newest stay; None: all.
        """
        # Orbax's policies do not match its own protocols, so they go untyped.
        save: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(every)
        preserve: Any = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            absolute(run_dir / CHECKPOINTS_FOLDER),  # Orbax wants it so
            save_decision_policy=save,
            preservation_policy=preserve,
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    def save(self, step: int, state: TrainState, *, force: bool = False) -> None:
        """Begin to save if `step` is one of those that are kept, or if it must be."""
        if force and step in {checkpoint.step for checkpoint in self._checkpointer.checkpoints}:
            return
        tree: Any = state._asdict()
        self._checkpointer.save_async(step, tree, force=force)

    def latest(self) -> int | None:
        """The newest complete checkpoint's step; None where there is none."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def load(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`, with the structure, dtypes and shardings of `like`; waits for a last write."""
        self._checkpointer.wait()
        abstract: Any = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict()
        )
        tree: Any = self._checkpointer.load(step, abstract)
        return TrainState(**tree)

"""Checkpoints of the training state: written beside the training, whole or not at all; readers write nothing.

A checkpoint is a folder `checkpoints/STEP`, which Orbax writes, with a digest of every file in it. The digest
is written last, so a step counts once it is there; checkpoints made before digests were kept count without.
"""

from mc_jax.training.checkpoint.folder import CHECKPOINTS_FOLDER
from mc_jax.training.checkpoint.reading import (
    Loaded,
    Seal,
    Whole,
    load_newest,
    load_part,
    load_step,
    must_be_finite,
    newest_whole,
    saved_shapes,
)
from mc_jax.training.checkpoint.writing import Checkpoints

__all__ = [
    "CHECKPOINTS_FOLDER",
    "Checkpoints",
    "Loaded",
    "Seal",
    "Whole",
    "load_newest",
    "load_part",
    "load_step",
    "must_be_finite",
    "newest_whole",
    "saved_shapes",
]

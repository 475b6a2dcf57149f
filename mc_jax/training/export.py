"""A run's weights alone, in a folder that others begin with: no optimizer's state, adapters merged.

The folder is that of a run whose one checkpoint holds the parameters alone: config.json, tokenizer.json,
`checkpoints/STEP` as Orbax writes it, with its digest, and export.json, which tells the origin.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from mc_jax import config as configs
from mc_jax.data.files import new_folder, write_json, write_text
from mc_jax.training.checkpoint import CHECKPOINTS_FOLDER
from mc_jax.training.checkpoint.digest import (
    Digest,
    hash_of_digests,
    hash_own_files,
    read_digests,
    write_digest,
)
from mc_jax.training.checkpoint.folder import WITH_DIGEST, Kind, checkpoints_of, kind_of
from mc_jax.training.checkpoint.reading import STATE
from mc_jax.training.run import CONFIG_FILE, EXPORT_FILE, TOKENIZER_FILE, Run
from mc_jax.training.seal import make_seal
from mc_jax.training.step import split_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    step: int
    """Finished steps of the checkpoint."""
    parameters: int
    """Numbers."""
    bytes: int
    """Size of all files."""


def export_run(run: Run, folder: Path) -> Exported:
    """Write a run's weights, as `load_run` read them, into a new folder: whole or not at all.

    Args:
      run: read by this process alone.
      folder: must not be there.

    Raises:
      ValueError: the folder is there already.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; name another folder, or delete it")
    config = dataclasses.replace(
        run.config, training=dataclasses.replace(run.config.training, adapter_rank=None)
    )
    step_folder = checkpoints_of(run.folder) / str(run.step)
    has_digest = kind_of(step_folder.parent, run.step) is Kind.SAVED
    parameters = split_model(run.model)[1]
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    with new_folder(folder) as partial:
        written = epath.Path(partial.resolve()) / CHECKPOINTS_FOLDER / str(run.step)
        tree: Any = {"parameters": parameters}
        ocp.save(written, tree, checkpointable_name=STATE, custom_metadata=WITH_DIGEST)
        loss = read_digests(step_folder)[0].loss if has_digest else math.nan
        seal = make_seal(config, run.dataset)
        write_digest(written, Digest(run.step, 0, 1, hash_own_files(written, 0, 1), loss, seal))
        run.dataset.tokenizer.save(epath.Path(partial) / TOKENIZER_FILE)
        write_text(partial / CONFIG_FILE, configs.to_json(config))
        origin = {
            "kind": "weights of a run",
            "run": str(run.folder),
            "step": run.step,
            "checkpoint_sha256": hash_of_digests(step_folder) if has_digest else None,
            "parameters": count,
        }
        write_json(partial / EXPORT_FILE, origin)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    return Exported(step=run.step, parameters=count, bytes=size)

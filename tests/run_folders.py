"""Folders of runs as a training leaves them, made without training."""

import dataclasses

from mc_jax.config import Config
from mc_jax.training.checkpoint.digest import Digest, write_digest
from mc_jax.training.run_folder import opened


def with_training(config: Config, **values) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **values))


def open_once(run, config, *, overwrite=False, step=0) -> int:
    """Open a run's folder as its training does, and return the rows that were read before."""
    with opened(run, config, overwrite=overwrite) as folder:
        return folder.begin(step)


def train_to(run, step: int, seal: dict[str, str] | None = None) -> None:
    """Leave what a training leaves behind after some steps; without a seal, what an older one did."""
    (run / "checkpoints" / str(step) / "state").mkdir(parents=True)
    if seal is not None:
        write_digest(run / "checkpoints" / str(step), Digest(step, 0, 1, {}, 1.0, seal))
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(1, step + 1)))


def names(run) -> set[str]:
    return {entry.name for entry in run.iterdir()}

"""What a checkpoint's weights were trained with: its seal, which every opening of a run is held against.

A flat dict of texts: one for each setting that makes the model and the order of its data, and the hashes of
tokenizer and texts. It lies in the checkpoint's digest, so that config.json, tokenizer.json and the corpus
cannot change under a run unseen. Settings of the schedule, of batches, evaluation and devices are not in it:
those may change.
"""

import contextlib
import json
from collections.abc import Mapping

from etils import epath

from mc_jax import config as configs
from mc_jax.config import Config
from mc_jax.data.dataset import Dataset
from mc_jax.training.checkpoint.digest import DamagedError
from mc_jax.training.checkpoint.folder import checkpoints_of, steps_in
from mc_jax.training.checkpoint.reading import read_seal

_SEALED = (
    "data.context_length",
    "training.seed",
    "training.optimizer",
    "training.train",
    "training.freeze",
    "training.adapter_rank",
)
_TOKENIZER, _TRAINING_TEXT, _HELD_OUT_TEXT = "tokenizer", "training text", "held-out text"
INITIAL_WEIGHTS = "weights that the run began with"
"""The checkpoint of another run, where it was one."""
_CURES = {
    INITIAL_WEIGHTS: "restore init.json",
    _TOKENIZER: "restore tokenizer.json",
    _TRAINING_TEXT: "restore the corpus",
    _HELD_OUT_TEXT: "restore the corpus",
}


def make_seal(config: Config, dataset: Dataset) -> dict[str, str]:
    """The seal of a checkpoint that is trained with these settings on this data."""
    held_out = "" if dataset.held_out is None else dataset.held_out.content_hash()
    return seal_of_settings(config) | {
        _TOKENIZER: dataset.tokenizer.fingerprint,
        _TRAINING_TEXT: dataset.train.content_hash(),
        _HELD_OUT_TEXT: held_out,
    }


def seal_of_settings(config: Config) -> dict[str, str]:
    """The part of a seal that the settings alone make."""
    return {
        f"{section}.{name}": json.dumps(value)
        for section, content in configs.to_dict(config).items()
        for name, value in content.items()
        if is_sealed(f"{section}.{name}")
    }


def is_sealed(name: str) -> bool:
    """Whether another value of a setting ("model.memory") would make what a run was trained with untrue."""
    return name.startswith("model.") or name in _SEALED


def newest_seal(run_dir: epath.Path) -> tuple[int, Mapping[str, str]] | None:
    """The newest step whose seal can be read, and the seal; None where no checkpoint has one."""
    folder = checkpoints_of(run_dir)
    for step in reversed(steps_in(folder)):
        with contextlib.suppress(DamagedError):
            seal = read_seal(folder, step)
            if seal is not None:
                return step, seal
    return None


def must_fit(sealed: tuple[int, Mapping[str, str]] | None, other: Mapping[str, str], run: object) -> None:
    """See that a run's folder and data still are what its checkpoints were trained with.

    What only one of the seals knows does not count: a setting may be older or younger than the checkpoint.

    Args:
      sealed: as `newest_seal` has it.
      other: the seal, or a part of it, of the settings and data as they are now.
      run: the run's folder, for the message.

    Raises:
      ValueError: they are not; one line with what changed.
    """
    if sealed is None:
        return
    step, seal = sealed
    changed = sorted(name for name in seal.keys() & other.keys() if seal[name] != other[name])
    if not changed:
        return
    told = ", ".join(
        f"the {name} is another" if name in _CURES else f"{name} was {seal[name]} and is {other[name]}"
        for name in changed
    )
    cures = dict.fromkeys(_CURES.get(name, "restore config.json") for name in changed)
    raise ValueError(
        f"{run} is no longer what its checkpoint of step {step} was trained with: {told}; "
        f"{' and '.join(cures)}, or train under another --name"
    )

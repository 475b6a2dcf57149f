"""What a checkpoint's weights were trained with: its seal, which every opening of a run is held against.

A flat dict of texts: one for each setting that makes the model and the order of its data, and the hashes of
tokenizer and texts. It lies in the checkpoint's digest, so that config.json, tokenizer.json and the corpus
cannot change under a run unseen. Settings of the schedule, of batches, evaluation and devices are not in it:
those may change.
"""

import json
from collections.abc import Mapping

from mc_jax import config as configs
from mc_jax.config import Config
from mc_jax.data.dataset import Dataset

_SEALED = ("model", "data.context_length", "training.seed", "training.optimizer")
_TOKENIZER, _TRAINING_TEXT, _HELD_OUT_TEXT = "tokenizer", "training text", "held-out text"


def make_seal(config: Config, dataset: Dataset) -> dict[str, str]:
    """The seal of a checkpoint that is trained with these settings on this data."""
    held_out = "" if dataset.held_out is None else dataset.held_out.content_hash()
    return {
        **{name: json.dumps(value) for name, value in _settings(config).items() if is_sealed(name)},
        _TOKENIZER: dataset.tokenizer.fingerprint,
        _TRAINING_TEXT: dataset.train.content_hash(),
        _HELD_OUT_TEXT: held_out,
    }


def is_sealed(name: str) -> bool:
    """Whether another value of a setting ("model.memory") would make what a run was trained with untrue."""
    return name.startswith("model.") or name in _SEALED


def unlike(seal: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What differs between a checkpoint's seal and one made now, in words; [] if they agree.

    What only one of them knows does not count: a setting may be older or younger than the checkpoint.
    """
    told = []
    for name in seal.keys() & other.keys():
        if seal[name] == other[name]:
            continue
        if name in (_TRAINING_TEXT, _HELD_OUT_TEXT, _TOKENIZER):
            told.append(f"the {name} is another")
        else:
            told.append(f"{name} was {seal[name]} and is {other[name]}")
    return sorted(told)


def must_fit(seal: Mapping[str, str] | None, other: Mapping[str, str], *, run: str, step: int) -> None:
    """See that a run's folder and data still are what its checkpoint was trained with.

    Args:
      seal: the checkpoint's; None: an older one, which has none.
      other: that of the settings and data as they are now.
      run: the run's folder, for the message.
      step: the checkpoint's.

    Raises:
      ValueError: they are not; one line with what changed.
    """
    changed = [] if seal is None else unlike(seal, other)
    if changed:
        raise ValueError(
            f"{run} is no longer what its checkpoint of step {step} was trained with: {', '.join(changed)}; "
            "restore config.json, tokenizer.json or the corpus, or train under another --name"
        )


def _settings(config: Config) -> dict[str, object]:
    return {
        f"{section}.{name}": value
        for section, content in configs.to_dict(config).items()
        for name, value in content.items()
    }

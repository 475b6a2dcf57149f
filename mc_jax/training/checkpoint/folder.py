"""The folder of a run's checkpoints: which steps it holds, which of them count, and how one is taken out."""

import enum
import json
import re
from typing import Any

from etils import epath

from mc_jax.data.files import is_in_bucket, sync
from mc_jax.training._buckets import absolute
from mc_jax.training.checkpoint.digest import DamagedError, digest_file, read_digest

CHECKPOINTS_FOLDER = "checkpoints"
WITH_DIGEST: dict[str, Any] = {"with_digest": True}
"""What Orbax is told to keep of a checkpoint that is to have a digest."""

_TEMPORARY = ".orbax-checkpoint-tmp"
_DELETED = ".deleted"
_DAMAGED = ".damaged"
_ORBAX_METADATA = "_CHECKPOINT_METADATA"
# An empty file, in which no bit can flip: later steps without a digest do not count.
_MARKER = re.compile(r"digests-after-([0-9]+)")


class Kind(enum.Enum):
    """What a step's folder is, by the names in it."""

    SAVED = "saved"
    """It has all its digests."""
    OLD = "old"
    """It was made before digests were kept."""
    UNFINISHED = "unfinished"
    """A digest is missing: it is being written, held back, or was cut off."""


def checkpoints_of(run_dir: epath.Path) -> epath.Path:
    """The folder of a run's checkpoints, from the root, as Orbax wants it.

    Raises:
      ValueError: Orbax would save there and never find it again, for it takes the path for a pattern.
    """
    folder = absolute(run_dir / CHECKPOINTS_FOLDER)
    if "[" in str(folder):
        raise ValueError(f"checkpoints cannot be read back from a path with '[' ({run_dir}); choose another")
    return folder


def steps_in(folder: epath.Path) -> list[int]:
    """The steps that have a folder, in order, whatever is in it."""
    if not folder.exists():
        return []
    # No other spelling of a number, such as 007: its folder would not be found again.
    names = [path.name for path in folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)]
    return sorted(int(name) for name in names if (folder / name).is_dir())


def kind_of(folder: epath.Path, step: int) -> Kind:
    """What a step's folder is, without a look at what was saved."""
    step_folder = folder / str(step)
    if not digest_file(step_folder, 0).exists():
        return Kind.OLD if step <= _last_without_digest(folder) else Kind.UNFINISHED
    try:
        processes = read_digest(step_folder).processes
    except DamagedError:
        return Kind.SAVED  # though not whole
    except FileNotFoundError:
        return Kind.UNFINISHED
    is_whole = all(digest_file(step_folder, process).exists() for process in range(1, processes))
    return Kind.SAVED if is_whole else Kind.UNFINISHED


def keep_digests_after(folder: epath.Path, step: int) -> None:
    """Make the folder one in which steps after `step` count with a digest alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if step < _last_without_digest(folder):
        marker = folder / f"digests-after-{step}"
        marker.write_text("")
        for path in (marker, folder, folder.parent):
            sync(path)


def clear_after(folder: epath.Path, start: int) -> None:
    """Make room for the steps after `start`: what a kill left is deleted, what is damaged renamed.

    Nobody else may be writing. Where nothing was ever whole, nothing is deleted.
    """
    kinds = {step: kind_of(folder, step) for step in steps_in(folder)}
    keep_digests_after(folder, start)
    delete_temporary(folder)
    for step, kind in kinds.items():
        if start and kind is Kind.UNFINISHED and _is_ours(folder, step):
            delete_step(folder, step)
        elif kind is Kind.UNFINISHED or step > start:
            aside = folder / f"{step}{_DAMAGED}"
            if aside.exists():
                aside.rmtree()
            (folder / str(step)).rename(aside)


def delete_unfinished(folder: epath.Path) -> None:
    """Delete what a training saved that does not count. Nobody else may be writing."""
    delete_temporary(folder)
    for step in steps_in(folder):
        if kind_of(folder, step) is Kind.UNFINISHED and _is_ours(folder, step):
            delete_step(folder, step)


def delete_but_newest(folder: epath.Path, keep: int) -> None:
    """Delete all finished checkpoints but some of the newest."""
    finished = [step for step in steps_in(folder) if kind_of(folder, step) is not Kind.UNFINISHED]
    for step in finished[:-keep]:
        delete_step(folder, step)


def delete_step(folder: epath.Path, step: int) -> None:
    """Delete a checkpoint, which from the first moment does not count."""
    step_folder = folder / str(step)
    if is_in_bucket(folder):
        for path in step_folder.glob("digest.*.json"):
            path.unlink(missing_ok=True)
    else:
        step_folder = step_folder.rename(folder / f"{step}{_DELETED}")
    step_folder.rmtree(missing_ok=True)


def delete_temporary(folder: epath.Path) -> None:
    """Delete what a killed training was writing or deleting. Nobody else may be writing."""
    for path in list(folder.iterdir()):
        if _TEMPORARY in path.name or path.name.endswith(_DELETED):
            path.rmtree(missing_ok=True)


def _last_without_digest(folder: epath.Path) -> float:
    found = [_MARKER.fullmatch(path.name) for path in folder.iterdir()]
    return min((int(name[1]) for name in found if name), default=float("inf"))


def _is_ours(folder: epath.Path, step: int) -> bool:
    """Whether a training wrote a step and was to write its digest, so that nobody else has put it there."""
    try:
        saved = json.loads((folder / str(step) / _ORBAX_METADATA).read_text())
        return saved["custom_metadata"] == WITH_DIGEST
    except (OSError, ValueError, KeyError, TypeError):
        return False

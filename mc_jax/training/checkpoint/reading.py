"""Reading the newest whole checkpoint of a run. Nothing is written: a training may be under way."""

import gc
import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from mc_jax.parallel.processes import first_of_all, told_by_first
from mc_jax.training.checkpoint.digest import DamagedError, read_digests, verify
from mc_jax.training.checkpoint.folder import Kind, checkpoints_of, kind_of, steps_in
from mc_jax.training.step import TrainState, all_finite, by_name

STATE = "state"
"""The name that Orbax knows the saved tree by."""

type Seal = Mapping[str, str] | None
"""What a run was made of, as `Checkpoints` was told; None: the checkpoint is older than seals."""

# Within it a reader is lucky once, however fast a training replaces its checkpoints.
_SECONDS_OF_PATIENCE = 60.0


class Loaded(NamedTuple):
    """A checkpoint that was read."""

    step: int
    state: TrainState
    seal: Seal
    has_digest: bool = False
    """So that all of it is as it was saved, and finite."""


class Whole(NamedTuple):
    """A checkpoint that is as it was saved."""

    step: int
    seal: Seal
    has_digest: bool
    """Without one nobody can tell."""


class _Found(NamedTuple):
    """The newest step that may be whole."""

    step: int
    kind: Kind
    unfinished: list[int]
    """Newer ones."""


def load_newest(run_dir: epath.Path, like: TrainState) -> Loaded | None:
    """Read the newest checkpoint that is whole; a line on stderr names newer ones, and why they are no use.

    Several processes must all call it; each checks a share of the files.

    Args:
      run_dir: the run's folder.
      like: arrays, or their shapes, with structure, dtypes and shardings of the state.

    Returns:
      None where no checkpoint was ever finished.

    Raises:
      ValueError: there are checkpoints, and none is whole; or the newest one is of another model.
    """
    folder = checkpoints_of(run_dir)
    damaged: dict[int, str] = {}
    deadline = time.monotonic() + _SECONDS_OF_PATIENCE
    while (found := _newest(folder, damaged)) is not None:
        try:
            loaded = _load(folder, found, like)
        except DamagedError as damage:
            if told_by_first("here" if _is_here(folder, found) else "gone") == "here":
                damaged[found.step] = str(damage)
            elif time.monotonic() > deadline:
                raise ValueError(
                    f"{folder}: each checkpoint was deleted while it was read; set "
                    "--training.keep-checkpoints or --training.checkpoint-every of the training higher"
                ) from damage
            continue
        _tell(folder, found, damaged)
        return loaded
    if damaged:
        raise ValueError(
            f"{folder} has no whole checkpoint: {_listed(damaged)}; put a copy back, or --overwrite the run"
        )
    return None


def load_step(run_dir: epath.Path, step: int, like: TrainState) -> Loaded:
    """Read the checkpoint of one step; otherwise as `load_newest`.

    Raises:
      ValueError: there is no such step, or it is not whole, or of another model.
    """
    folder = checkpoints_of(run_dir)
    there = [one for one in steps_in(folder) if kind_of(folder, one) is not Kind.UNFINISHED]
    if step not in there:
        listed = ", ".join(map(str, there)) or "none"
        raise ValueError(f"{run_dir} has no checkpoint of step {step}; there are {listed}")
    found = _Found(step, kind_of(folder, step), [])
    try:
        loaded = _load(folder, found, like)
    except DamagedError as damage:
        raise ValueError(
            f"{folder / str(step)} is no use ({damage}); put a copy back, or name another step"
        ) from damage
    _tell(folder, found, {})
    return loaded


def newest_whole(run_dir: epath.Path, step: int | None = None) -> Whole:
    """The newest checkpoint whose files are all as they were saved; this process alone looks at them.

    A line on stderr names newer ones, and why they are no use.

    Args:
      run_dir: the run's folder.
      step: the only one to look at; None: whichever is whole.

    Raises:
      ValueError: there is none, or the one that is asked for is not whole.
    """
    folder = checkpoints_of(run_dir)
    useless: dict[int, str] = {}
    for one in sorted(steps_in(folder), reverse=True) if step is None else [step]:
        kind = kind_of(folder, one) if (folder / str(one)).is_dir() else Kind.UNFINISHED
        if kind is Kind.UNFINISHED:
            useless[one] = "it is not there, being written, or was cut off"
            continue
        seal = None
        if kind is Kind.SAVED:
            try:
                digests = read_digests(folder / str(one))
                seal = digests[0].seal
                verify(folder / str(one), digests)
            except (DamagedError, FileNotFoundError) as damage:
                useless[one] = str(damage) if isinstance(damage, DamagedError) else "a digest is gone"
                continue
        if useless:
            print(f"mc-jax: {folder}: {_listed(useless)}; step {one} is used", file=sys.stderr)
        return Whole(one, seal, kind is Kind.SAVED)
    told = f" ({_listed(useless)})" if useless else ""
    raise ValueError(f"{run_dir} has no whole checkpoint to begin from{told}; name another step, or train it")


def saved_shapes(step_folder: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a checkpoint's parameters, by their names with dots; nothing else is read.

    Raises:
      ValueError: Orbax cannot read what is there.
    """
    try:
        saved: Any = ocp.metadata(step_folder, checkpointable_name=STATE).metadata
        leaves = by_name(saved["parameters"])
    except Exception as error:  # Orbax raises of all kinds
        reason = " ".join(f"{error}".split())[:200]
        raise ValueError(f"{step_folder} is no checkpoint of mc_jax ({reason}); name another one") from error
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}


def load_part(step_folder: epath.Path, like: Any) -> Any:
    """A part of a checkpoint's state, of which several processes must all call for the same.

    Args:
      step_folder: the checkpoint.
      like: shapes, dtypes and shardings of what is wanted, in dicts with the names of `TrainState`'s fields.

    Raises:
      ValueError: it is not there as it is wanted.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        tree = _read_tree(step_folder, like)
    if isinstance(tree, str):
        raise ValueError(f"{step_folder} cannot be read ({tree}); it may be gone, or of another version")
    return tree


def must_be_finite(run_dir: epath.Path, loaded: Loaded, tree: Any) -> None:
    """See that what was loaded, or a part of it, is of numbers: before digests nobody looked.

    Raises:
      ValueError: it is not; the message names the step to use instead.
    """
    if loaded.has_digest or all_finite(tree):
        return
    folder = checkpoints_of(run_dir)
    earlier = [step for step in steps_in(folder) if step < loaded.step]
    cure = "train it anew with a lower --training.learning-rate under another --name"
    if earlier:
        cure = f"move {folder / str(loaded.step)} elsewhere, and step {earlier[-1]} is used"
    raise ValueError(
        f"the weights of step {loaded.step} in {run_dir} are not finite, for the training diverged; {cure}"
    )


def read_seal(folder: epath.Path, step: int) -> Seal:
    """What the run of a checkpoint was made of.

    Raises:
      DamagedError: the digest is not what was written.
    """
    try:
        return read_digests(folder / str(step))[0].seal
    except FileNotFoundError:
        return None


def _newest(folder: epath.Path, damaged: dict[int, str]) -> _Found | None:
    """The newest step that may be whole, as process 0 sees it."""
    found = None
    while jax.process_index() == 0 and found is None:
        unfinished = []
        steps = steps_in(folder)
        for step in sorted(set(steps) - set(damaged), reverse=True):
            kind = kind_of(folder, step)
            if kind is not Kind.UNFINISHED:
                found = _Found(step, kind, unfinished)
                break
            unfinished.append(step)
        # A training may have finished a newer one, and deleted this one, meanwhile.
        if steps_in(folder) == steps:
            break
    told = json.loads(told_by_first(json.dumps(found and [found.step, found.kind.value, found.unfinished])))
    return told and _Found(told[0], Kind(told[1]), told[2])


def _is_here(folder: epath.Path, found: _Found) -> bool:
    """Whether a step is there as it was found."""
    return (folder / str(found.step)).exists() and kind_of(folder, found.step) is found.kind


def _load(folder: epath.Path, found: _Found, like: TrainState) -> Loaded:
    step_folder = folder / str(found.step)
    seal, problem = None, ""
    if found.kind is Kind.SAVED:
        try:
            digests = read_digests(step_folder)
            seal = digests[0].seal
            verify(step_folder, digests, share=jax.process_index(), shares=jax.process_count())
        except DamagedError as damage:
            problem = str(damage)
        except FileNotFoundError:
            problem = "a digest is gone"
        problem = first_of_all(problem)
    if problem:
        raise DamagedError(problem)
    abstract: Any = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict()
    )
    tree = _read_tree(step_folder, abstract)
    if not isinstance(tree, str):
        return Loaded(found.step, TrainState(**tree), seal, found.kind is Kind.SAVED)
    # Of several processes all would have to go on alike.
    if jax.process_count() == 1 and (found.kind is Kind.OLD or not _is_here(folder, found)):
        raise DamagedError(f"Orbax cannot read it: {tree}")
    is_whole = "is whole, but" if found.kind is Kind.SAVED else "is damaged, or"
    raise ValueError(
        f"{step_folder} {is_whole} not of the model that config.json and this code make ({tree})"
    )


def _read_tree(step_folder: epath.Path, abstract: Any) -> dict[str, Any] | str:
    """The saved tree, or in a line why it cannot be read."""
    # Else each array whose reading is given up prints a page.
    hook, log = sys.unraisablehook, logging.getLogger("asyncio")
    sys.unraisablehook, log.disabled = (lambda _: None), True
    try:
        try:
            tree: Any = ocp.load(step_folder, abstract, checkpointable_name=STATE)
            return tree
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # Orbax and TensorStore raise of all kinds
            reason = " ".join(f"{error}".split())[:200]
        gc.collect()
        return reason
    finally:
        sys.unraisablehook, log.disabled = hook, False


def _tell(folder: epath.Path, found: _Found, damaged: dict[int, str]) -> None:
    lines = []
    if damaged or found.unfinished:
        why = dict.fromkeys(found.unfinished, "it has no digest: it is being written, or was cut off")
        lines.append(f"{folder}: {_listed(damaged | why)}; step {found.step} is used")
    if found.kind is Kind.OLD:
        lines.append(f"{folder}: step {found.step} has no digest, being older, so damage would not be seen")
    for line in lines if jax.process_index() == 0 else ():
        print(f"mc-jax: {line}", file=sys.stderr)


def _listed(useless: dict[int, str]) -> str:
    return ", ".join(f"step {step} is no use ({reason})" for step, reason in sorted(useless.items()))

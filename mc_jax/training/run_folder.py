"""A run's folder, opened to train: who may write to it, what is in it, and how a run begins or goes on.

Process 0 looks and writes; what it refuses ends all. A folder that has a config.json is a run; without one it
is empty, half made (a kill, a full disk) or not ours.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator

import jax
from etils import epath

from mc_jax import config as configs
from mc_jax.config import Config
from mc_jax.data.dataset import Dataset, open_data
from mc_jax.data.files import UNFINISHED, write_text
from mc_jax.parallel.processes import first_decides, must_agree
from mc_jax.training._buckets import absolute
from mc_jax.training.checkpoint.folder import CHECKPOINTS_FOLDER, Kind, checkpoints_of, kind_of, steps_in
from mc_jax.training.initial import (
    INIT_FILE,
    Init,
    Provenance,
    examine,
    find_source,
    must_be_there,
    read_provenance,
    write_provenance,
)
from mc_jax.training.initial.provenance import asked_for, must_be_the_same
from mc_jax.training.lock import LOCK_FILE, RunLock
from mc_jax.training.run import CONFIG_FILE, EXPORT_FILE, TOKENIZER_FILE, read_config
from mc_jax.training.seal import (
    INITIAL_WEIGHTS,
    is_sealed,
    make_seal,
    must_fit,
    newest_seal,
    seal_of_settings,
)
from mc_jax.training.stages import STAGES_FILE, Stages, one_stage, read_stages, write_stages

_REPORT_FILE = "report.html"
# What config.json is called while an --overwrite deletes the run: then any start finishes that first.
_OVERWRITTEN_FILE = "overwritten" + UNFINISHED[0]
_NAMES_OF_DATA = ("data.corpus", "data.tokenizer", "data.vocab_size")


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run's folder in the hands of its training."""

    folder: epath.Path
    config: Config
    dataset: Dataset
    seal: dict[str, str]
    """What its checkpoints are trained with."""
    stages: Stages
    """The stages that the folder tells of."""
    lock: RunLock | None
    """Process 0's."""
    provenance: Provenance | None = None
    """The run whose weights it began with; None: they were drawn."""

    def check(self) -> None:
        """See that the folder is still there and ours; to be called before anything is written.

        Raises:
          ValueError: it was deleted, moved, or taken over.
        """
        if self.lock is not None:
            self.lock.check()

    def begin(self, step: int) -> int:
        """Write down the stage that begins after `step`, if it is another; return the rows read before."""
        stages = self.stages.at(step, self.config)
        if self.lock is not None and stages != self.stages:
            write_stages(self.folder, stages)
            write_text(self.folder / CONFIG_FILE, configs.to_json(self.config))
            if stages.changes():
                last = stages.changes()[-1].settings
                changed = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in last.items())
                print(f"{self.folder} goes on with other settings from step {step}: {changed}", flush=True)
        return stages.rows_before(step)


@contextlib.contextmanager
def opened(
    run_dir: epath.Path, config: Config, *, overwrite: bool, init: Init | None = None
) -> Iterator[OpenRun]:
    """Hold a run's folder and open its data: made where it is missing, locked until the end.

    Args:
      run_dir: the folder.
      config: what is trained.
      overwrite: start anew, whatever run the folder holds.
      init: whose weights a new run begins with; None: they are drawn.

    Raises:
      ValueError: another training holds the folder, it holds something else, the data or the weights to begin
        with do not fit, or the processes differ in their settings, their data, or what they see of the
        folder. Nothing is written in these cases, but in the last one.
    """
    checkpoints_of(run_dir)
    if not overwrite:
        config = _with_branch_of(run_dir, config)
    must_agree("settings", f"{run_dir} {overwrite} {init} {configs.to_json(config)}")
    with contextlib.ExitStack() as stack:
        found: OpenRun | None = None

        def open_first() -> None:
            nonlocal found
            lock = stack.enter_context(RunLock(run_dir))
            found = _open(run_dir, config, lock, overwrite=overwrite, init=init)

        first_decides(open_first)
        if found is None:
            path = run_dir / CONFIG_FILE
            if not path.exists():
                raise ValueError(
                    f"process {jax.process_index()} does not see {path}, which process 0 has; "
                    "set --runs-dir to a folder on a file system that all processes share"
                )
            dataset = _open_data(config, run_dir / TOKENIZER_FILE)
            provenance = read_provenance(run_dir)
            seal = _seal(config, dataset, provenance)
            stages = _stages(run_dir, read_config(run_dir))
            found = OpenRun(run_dir, config, dataset, seal, stages, None, provenance)
        must_agree("text to train on", json.dumps(found.seal))
        yield found


def newest_step(run_dir: epath.Path) -> int | None:
    """The newest step among a run's checkpoints; None without one."""
    folder = checkpoints_of(run_dir)
    counted = (step for step in steps_in(folder) if kind_of(folder, step) is not Kind.UNFINISHED)
    return max(counted, default=None)


def _open(
    run_dir: epath.Path, config: Config, lock: RunLock, *, overwrite: bool, init: Init | None
) -> OpenRun:
    if init is not None and absolute(run_dir) in _with_parents(asked_for(init).path):
        raise ValueError(f"--init {init.path} is of the run itself; choose another --name")
    if (run_dir / EXPORT_FILE).exists():
        raise ValueError(
            f"{run_dir} holds exported weights, which do not go on; give another --name and --init {run_dir}"
        )
    if (run_dir / _OVERWRITTEN_FILE).exists():
        _delete(run_dir)
    if overwrite and (run_dir / CONFIG_FILE).exists() and not _is_the_same_command(run_dir, config, init):
        _begin(config, init)  # what it refuses must be told before anything is lost
        (run_dir / CONFIG_FILE).rename(run_dir / _OVERWRITTEN_FILE)
        _delete(run_dir)
    sealed = newest_seal(run_dir)
    earlier = _earlier(run_dir, config if sealed else None)
    if earlier is None:
        dataset, provenance = _begin(config, init)
        stages = _make(run_dir, config, dataset, overwrite, provenance)
        seal = _seal(config, dataset, provenance)
        return OpenRun(run_dir, config, dataset, seal, stages, lock, provenance)
    provenance = read_provenance(run_dir)
    must_be_the_same(run_dir, provenance, init)
    must_fit(sealed, seal_of_settings(earlier), run_dir)
    _must_go_on(run_dir, config, earlier, may_move=sealed is not None)
    dataset = _open_data(config, run_dir / TOKENIZER_FILE)
    seal = _seal(config, dataset, provenance)
    must_fit(sealed, seal, run_dir)
    if provenance is not None and newest_step(run_dir) is None:
        must_be_there(provenance)
    if overwrite:
        print(
            f"{run_dir} is a run that --overwrite began and that has not ended: it goes on; "
            "delete the folder to start anew",
            flush=True,
        )
    if not (run_dir / TOKENIZER_FILE).exists():
        dataset.tokenizer.save(run_dir / TOKENIZER_FILE)
    if not (run_dir / CONFIG_FILE).exists():
        write_text(run_dir / CONFIG_FILE, configs.to_json(config))
    return OpenRun(run_dir, config, dataset, seal, _stages(run_dir, earlier), lock, provenance)


def _with_parents(path: str) -> tuple[epath.Path, ...]:
    return (epath.Path(path), *epath.Path(path).parents)


def _begin(config: Config, init: Init | None) -> tuple[Dataset, Provenance | None]:
    """A new run's data, and the weights it begins with, looked at before anything is written."""
    if init is None:
        return _open_data(config), None
    dataset = _open_data(config, find_source(init.path).tokenizer_file_for(config.data))
    return dataset, examine(init, config, dataset)


def _seal(config: Config, dataset: Dataset, provenance: Provenance | None) -> dict[str, str]:
    """What the run's checkpoints are trained with; its first weights too, where they were another's."""
    begun = {} if provenance is None else {INITIAL_WEIGHTS: provenance.weights()}
    return make_seal(config, dataset) | begun


def _stages(run_dir: epath.Path, earlier: Config) -> Stages:
    stages = read_stages(run_dir)
    return stages if stages.stages else one_stage(earlier)


def _open_data(config: Config, tokenizer_path: epath.Path | None = None) -> Dataset:
    """The data of a training, in which there is all that the config asks for."""
    dataset = open_data(config.data, tokenizer_path)
    if config.evaluation.every is not None and dataset.held_out is None:
        raise ValueError(
            f"evaluation.every {config.evaluation.every} needs held-out text, and {config.data.corpus} has "
            "none; let mc-jax prepare split some off, or set evaluation.every and evaluation.tokens to None"
        )
    return dataset


def _earlier(run_dir: epath.Path, config: Config | None) -> Config | None:
    """The settings of the run that the folder holds; None where it is empty, or half made.

    Args:
      run_dir: the folder.
      config: what the settings are taken to be where the file is lost; None: that is an error.

    Raises:
      ValueError: the folder holds something else, or its config.json is damaged.
    """
    path = run_dir / CONFIG_FILE
    has_checkpoints = newest_step(run_dir) is not None
    if path.exists():
        try:
            return read_config(run_dir)
        except ValueError as error:
            if has_checkpoints:
                raise ValueError(
                    f"{error}; this command writes a deleted {CONFIG_FILE} of {run_dir} anew, "
                    "if the checkpoints were trained by it"
                ) from None
            return None  # cut off by a full disk or a power cut, before anything was trained
    if has_checkpoints and config is None:
        raise ValueError(
            f"{run_dir} has checkpoints and no {CONFIG_FILE}; restore it, or choose another --name"
        )
    if has_checkpoints:
        return config
    ours = (LOCK_FILE, TOKENIZER_FILE, STAGES_FILE, INIT_FILE, CHECKPOINTS_FOLDER)
    for entry in run_dir.iterdir():
        if entry.name not in ours and entry.suffix not in UNFINISHED and not entry.name.startswith("."):
            raise ValueError(f"{run_dir} is not empty and not a run; choose another name with --name")
    return None


def _make(
    run_dir: epath.Path, config: Config, dataset: Dataset, overwrite: bool, provenance: Provenance | None
) -> Stages:
    """Write what a run begins with, the config last: a folder that has one is a run."""
    for entry in run_dir.iterdir():
        if entry.suffix in UNFINISHED or entry.name == INIT_FILE:
            _remove(entry)
    if provenance is not None:
        write_provenance(run_dir, provenance)
    dataset.tokenizer.save(run_dir / TOKENIZER_FILE)
    stages = Stages(overwrites=overwrite).at(0, config)
    write_stages(run_dir, stages)
    write_text(run_dir / CONFIG_FILE, configs.to_json(config))
    return stages


def _is_the_same_command(run_dir: epath.Path, config: Config, init: Init | None) -> bool:
    """Whether a launcher sends a command with --overwrite again, that a kill or SIGTERM ended.

    It is one if such a command began the run, with these settings, and the run has not come to its report.
    """
    try:
        provenance = read_provenance(run_dir)
        if (provenance and provenance.asked) != (init and asked_for(init)):
            return False
        earlier = read_config(run_dir)
        if _changed(config, earlier) or not read_stages(run_dir).overwrites:
            return False
    except ValueError:  # damaged: to be overwritten
        return False
    report = run_dir / _REPORT_FILE
    is_reported = report.exists() and report.stat().mtime >= (run_dir / CONFIG_FILE).stat().mtime
    return not (is_reported and (newest_step(run_dir) or 0) >= config.training.steps)


def _with_branch_of(run_dir: epath.Path, config: Config) -> Config:
    """The settings, with the branch of MLP memories that the folder's run has where they name none.

    A run from before there was a choice goes on by the command that began it.
    """
    if config.model.memory_branch is not None or not (run_dir / CONFIG_FILE).exists():
        return config
    try:
        earlier = read_config(run_dir).model
    except ValueError:  # told later, or made anew
        return config
    if (earlier.memory, earlier.memory_depth) != (config.model.memory, config.model.memory_depth):
        return config
    model = dataclasses.replace(config.model, memory_branch=earlier.memory_branch)
    return dataclasses.replace(config, model=model)


def _must_go_on(run_dir: epath.Path, config: Config, earlier: Config, *, may_move: bool) -> None:
    """See that nothing changes the past. A corpus may have moved where the seal tells that it is the same."""
    changed = _changed(config, earlier)
    past = {
        name: values
        for name, values in changed.items()
        if is_sealed(name) or (name in _NAMES_OF_DATA and not may_move)
    }
    if past:
        listed = ", ".join(f"{name} {old!r} there, {new!r} here" for name, (new, old) in past.items())
        raise ValueError(
            f"{run_dir} holds a run that was trained otherwise ({listed}), and what is trained cannot "
            "be changed; choose another --name, or --overwrite what is there"
        )
    step = newest_step(run_dir) or 0
    if changed and config.training.steps < step:
        raise ValueError(
            f"training.steps is {config.training.steps} and {run_dir} has trained {step} already; "
            f"set it to {step} or more, or choose another --name"
        )


def _changed(config: Config, earlier: Config) -> dict[str, tuple[object, object]]:
    """What differs, but for the mesh: a run may go on on other devices."""
    return configs.differences(dataclasses.replace(config, mesh=earlier.mesh), earlier)


def _delete(run_dir: epath.Path) -> None:
    """Delete a run, its checkpoints first, but for the lock; what marks this at last."""
    kept = (LOCK_FILE, _OVERWRITTEN_FILE)
    for entry in sorted(run_dir.iterdir(), key=lambda entry: entry.name != CHECKPOINTS_FOLDER):
        if entry.name not in kept:
            _remove(entry)
    (run_dir / _OVERWRITTEN_FILE).unlink()


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink()

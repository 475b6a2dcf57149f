"""The stages of a run: from which step on it was trained with which settings.

A run has one, until it goes on with other settings. `config.json` holds the newest ones, `stages.json` all.
"""

import dataclasses
import datetime
import json
from typing import Any, NamedTuple

from etils import epath

from mc_jax import config as configs
from mc_jax.config import Config
from mc_jax.data.files import write_json

STAGES_FILE = "stages.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Settings, and the steps for which they held: those after `from_step`, up to the next stage's."""

    from_step: int
    """Steps that were finished before."""
    began: str
    """When, as ISO 8601."""
    settings: dict[str, Any]
    """The config as nested dicts."""

    @property
    def batch_size(self) -> int:
        """Rows that each of its steps read."""
        return self.settings["training"]["batch_size"]


class Change(NamedTuple):
    """What a stage changed."""

    step: int
    """The last step before it."""
    began: str
    """When, as ISO 8601."""
    settings: dict[str, tuple[Any, Any]]
    """{"training.steps": (old, new)}."""


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of a run folder, in their order."""

    stages: tuple[Stage, ...] = ()
    overwrites: bool = False
    """Whether an --overwrite began the run: the same command, sent again, then goes on with it."""

    def at(self, step: int, config: Config) -> "Stages":
        """The stages of a run that goes on after `step` with these settings; those after it are forgotten."""
        settings = _plain(config)
        kept = [stage for stage in self.stages if stage.from_step <= step]
        while kept and kept[-1].from_step == step and _changes(kept[-1].settings, settings):
            kept.pop()
        if not kept or _changes(kept[-1].settings, settings):
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            kept.append(Stage(step, now, settings))
        return dataclasses.replace(self, stages=tuple(kept))

    def rows_before(self, step: int) -> int:
        """Rows of the data that the steps up to `step` have read."""
        ends = [stage.from_step for stage in self.stages[1:]] + [step]
        return sum(
            stage.batch_size * max(0, min(end, step) - stage.from_step)
            for stage, end in zip(self.stages, ends, strict=True)
        )

    def changes(self) -> list[Change]:
        """What each stage but the first changed."""
        pairs = zip(self.stages, self.stages[1:], strict=False)
        return [Change(new.from_step, new.began, _changes(old.settings, new.settings)) for old, new in pairs]


def one_stage(config: Config) -> Stages:
    """The stages of an older run, which has no file of them: what its config.json says."""
    return Stages((Stage(0, "", _plain(config)),))


def read_stages(run_dir: epath.Path) -> Stages:
    """The stages of a run; none of an older one, which has no such file.

    Raises:
      ValueError: the file is damaged.
    """
    path = run_dir / STAGES_FILE
    if not path.exists():
        return Stages()
    try:
        values = json.loads(path.read_text())
        stages = tuple(Stage(**stage) for stage in values["stages"])
        if not all(isinstance(stage.from_step + stage.batch_size, int) for stage in stages):
            raise TypeError("a stage without numbers")
        return Stages(stages, bool(values["overwrites"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); restore it, or delete it if the run "
            "never changed its batch size"
        ) from None


def write_stages(run_dir: epath.Path, stages: Stages) -> None:
    """Write a run's stages, whole or not at all."""
    write_json(run_dir / STAGES_FILE, dataclasses.asdict(stages))


def _plain(config: Config) -> dict[str, Any]:
    """The config as it is read back: without tuples."""
    return json.loads(configs.to_json(config))


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (old, new)} of what differs; without the mesh, and without settings that one of them lacks."""
    return {
        f"{section}.{name}": (old[section][name], value)
        for section, content in new.items()
        if section != "mesh" and section in old
        for name, value in content.items()
        if name in old[section] and old[section][name] != value
    }

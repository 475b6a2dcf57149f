"""The cells of a sweep: every combination of the settings that are turned, each that makes sense, once."""

import dataclasses
import functools
import itertools
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mc_jax.caching import Storage
from mc_jax.config import Config, ModelConfig, differences
from mc_jax.evaluation.dial import must_have_weights, turned_config
from mc_jax.evaluation.modes import Mode, mode_of
from mc_jax.facts import AGGREGATION_FACTS
from mc_jax.training.run import read_config

_OF_MODEL = ("model.aggregation", "model.segment_length", "model.top_k", "model.segmentation")
_OF_STORAGE = ("max_cached", "state_dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """What is turned, and to which values; an axis without values stays as each run was trained."""

    context_length: tuple[int, ...] = ()
    """Tokens in a window."""
    segment_length: tuple[int, ...] = ()
    """Tokens after which the memory's state is cached."""
    aggregation: tuple[str, ...] = ()
    """How the memories are read together."""
    top_k: tuple[int, ...] = ()
    """Cached memories that are read, where the aggregation selects them."""
    segmentation: tuple[str, ...] = ()
    """How segments are grouped."""
    max_cached: tuple[int | None, ...] = ()
    """Places for cached memories, in mode "stream"; None: one for each segment."""
    state_dtype: tuple[str | None, ...] = ()
    """Numbers that cached memories are kept as, in mode "stream"; None: as computed."""
    mode: tuple[str, ...] = ("windows",)
    """How the text is read."""
    when_full: str = "drop-oldest"
    """What a layer does whose places are taken, where `max_cached` says how many there are."""
    last_k: int | None = None
    """Tokens that a window of mode "last-k" scores; None: half of the shortest window."""
    first: int | None = None
    """First target of a document that "last-k" scores; None: as early as the longest window can."""
    stride: int | None = None
    """Tokens that a window of mode "windows" scores; None: as configured, or half of it."""

    def combinations(self) -> Iterator[dict[str, Any]]:
        """All of them, by name; what stays as it is has no name. The first of each mode turns nothing."""
        named = {
            "model.aggregation": self.aggregation,
            "model.top_k": self.top_k,
            "model.segment_length": self.segment_length,
            "model.segmentation": self.segmentation,
            "data.context_length": self.context_length,
            "max_cached": self.max_cached,
            "state_dtype": self.state_dtype,
        }
        given = {name: values for name, values in named.items() if values}
        for mode in self.mode:
            yield {"mode": mode}
            for values in itertools.product(*given.values()):
                yield {"mode": mode, **dict(zip(given, values, strict=True))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to read one run."""

    run: str
    """The run's folder."""
    changes: Mapping[str, Any]
    """Settings that are others than the run was trained with, as `turn` takes them."""
    config: Config
    """All settings, these among them."""
    trained: Config
    """What the run was trained with."""
    mode: str
    """How the text is read."""
    last_k: int | None = None
    """Tokens that a window of mode "last-k" scores."""
    first: int | None = None
    """First target of a document that "last-k" scores."""
    storage: Storage = Storage()  # noqa: RUF009 - frozen
    """How cached memories are kept."""

    @property
    def is_own(self) -> bool:
        """Whether the run is read as it was trained."""
        return not differences(self.config, self.trained) and self.storage == Storage()

    @functools.cached_property
    def reads_by(self) -> Mode:
        """The mode, with its windows."""
        return mode_of(self.config, self.mode, last_k=self.last_k, first=self.first, storage=self.storage)

    def settings(self) -> dict[str, Any]:
        """All that tells this cell from the run's others, and whatever follows from it."""
        model = self.config.model
        of_model = {
            "aggregation": model.aggregation,
            "segment_length": model.segment_length,
            "top_k": model.top_k,
            "segmentation": model.segmentation,
        }
        if "memory" not in model.layer_pattern:
            of_model = dict.fromkeys(of_model)
        kept = dataclasses.asdict(self.storage) if self.mode == "stream" else {}
        kept.pop("place", None)
        if self.storage.max_cached is None:
            kept.pop("when_full", None)
        return {"mode": self.mode, **of_model, **self.reads_by.settings(), **kept}

    @property
    def program(self) -> tuple[Any, ...]:
        """What cells have in common that a compiled program serves together."""
        windows = (self.storage,) if self.mode == "stream" else ()
        return self.run, self.mode == "stream", self.config.model, self.config.data.context_length, *windows

    def command(self, step: int | None, text: Sequence[str] = ()) -> str:
        """The `mc-jax eval` that measures this cell alone.

        Args:
          step: of the checkpoint; None: the newest.
          text: options that name the text.
        """
        words = ["mc-jax", "eval", self.run]
        words += [] if step is None else ["--step", str(step)]
        words += ["--mode", self.mode]
        for name, value in self.changes.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        for name in ("last_k", "first"):
            value = getattr(self, name)
            if value is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
        for name in ("max_cached", "when_full", "state_dtype"):
            value = getattr(self.storage, name)
            if value != getattr(Storage(), name):
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join([*words, *text])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What a sweep measures, and what it does not."""

    cells: tuple[Cell, ...]
    """Those that one compiled program serves stand together."""
    left_out: Mapping[str, int]
    """Why combinations are none of the cells, and how many each reason takes out."""

    def groups(self) -> list[tuple[Cell, ...]]:
        """The cells, those of one compiled program together."""
        return [tuple(cells) for _, cells in itertools.groupby(self.cells, key=lambda cell: cell.program)]


def grid_of(runs: Sequence[str], axes: Axes) -> Grid:
    """The cells of runs, each combination of settings once, and each run as it was trained first.

    A setting that has no effect beside another is left out of a combination, which may make it equal to one
    that is there. What contradicts itself, or needs weights that a run has not, is left out.

    Raises:
      ValueError: a folder without a config.
    """
    configs = {run: read_config(epath.Path(run)) for run in runs}
    windows = _last_k(configs.values(), axes)
    cells: dict[tuple[Any, ...], Cell] = {}
    left_out: Counter[str] = Counter()
    for run, config in configs.items():
        weights: dict[str, str | None] = {}
        for combination in axes.combinations():
            changes, storage, void = _meant(config, axes, combination)
            mode = combination["mode"]
            if mode == "windows" and axes.stride is not None:
                changes["evaluation.stride"] = axes.stride
            try:
                turned = turned_config(config, changes)
                cell = Cell(
                    run=run,
                    changes=_needed(changes, config),
                    config=turned,
                    trained=config,
                    mode=mode,
                    storage=storage,
                    **(windows if mode == "last-k" else {}),
                )
                cell.reads_by  # noqa: B018 - refuses windows that do not fit
                _must_fit(turned.model, storage)
            except ValueError as error:
                left_out[f"{_name(run, runs)}{error}"] += 1
                continue
            aggregation = turned.model.aggregation
            if aggregation not in weights:
                weights[aggregation] = _missing(run, config, cell.changes)
            if (missing := weights[aggregation]) is not None:
                left_out[missing] += 1
                continue
            key = (run, turned.model, *cell.settings().items())
            if key not in cells:
                cells[key] = cell
            else:
                left_out.update([f"the same as another cell: {reason}" for reason in void[:1]])
    order = {program: place for place, program in enumerate(dict.fromkeys(c.program for c in cells.values()))}
    # Windows first: a stream may need the run on another number of devices.
    ordered = sorted(cells.values(), key=lambda c: (runs.index(c.run), c.mode == "stream", order[c.program]))
    return Grid(cells=tuple(ordered), left_out=dict(left_out))


def _last_k(configs: Iterable[Config], axes: Axes) -> dict[str, int]:
    """The same block and first target for all windows, so that all score the same targets."""
    lengths = [*axes.context_length, *(config.data.context_length for config in configs)]
    k = max(1, min(lengths) // 2) if axes.last_k is None else axes.last_k
    return {"last_k": k, "first": max(max(lengths) - k, 0) if axes.first is None else axes.first}


def _meant(
    config: Config, axes: Axes, combination: Mapping[str, Any]
) -> tuple[dict[str, Any], Storage, list[str]]:
    """The settings of a combination that have an effect, and why the others have none."""
    mode = combination["mode"]
    aggregation = combination.get("model.aggregation", config.model.aggregation)
    about = AGGREGATION_FACTS[aggregation]
    reasons: dict[str, str] = {}
    if mode == "stream":
        reasons["data.context_length"] = "in mode 'stream', which has no windows"
    else:
        reasons |= dict.fromkeys(_OF_STORAGE, f"in mode {mode!r}, which keeps no cache")
    if "memory" not in config.model.layer_pattern:
        reasons |= dict.fromkeys((*_OF_MODEL, *_OF_STORAGE), "on a model without memory layers")
    else:
        with_aggregation = f"with aggregation {aggregation!r}"
        if about.top_k == "never":
            reasons["model.top_k"] = with_aggregation
        if not about.reads_cache:
            reasons |= dict.fromkeys(
                ("model.segmentation", *_OF_STORAGE), f"{with_aggregation}, which caches nothing"
            )
            if config.model.segment_init == "checkpoint":
                reasons["model.segment_length"] = f"{with_aggregation}, which caches nothing"
        elif not about.reads_groups and combination.get("model.segmentation") == "constant":
            reasons["model.segmentation"] = with_aggregation
    given = {name: value for name, value in combination.items() if name != "mode"}
    void = [f"{name.rpartition('.')[2]} has no effect {reasons[name]}" for name in given if name in reasons]
    kept = {name: value for name, value in given.items() if name not in reasons}
    places, dtype = kept.pop("max_cached", None), kept.pop("state_dtype", None)
    storage = Storage(
        max_cached=places, when_full="error" if places is None else axes.when_full, state_dtype=dtype
    )
    return kept, storage, void


def _needed(changes: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Those of the changes that are any."""
    found = {}
    for name, value in changes.items():
        section, _, field = name.partition(".")
        if getattr(getattr(config, section), field) != value:
            found[name] = value
    return found


def _must_fit(model: ModelConfig, storage: Storage) -> None:
    if storage.when_full == "drop-oldest" and model.segmentation == "logarithmic":
        raise ValueError(
            "segmentation 'logarithmic' groups all segments since the start and cannot drop the oldest"
        )


def _missing(run: str, config: Config, changes: Mapping[str, Any]) -> str | None:
    of_model = {name: value for name, value in changes.items() if name.startswith("model.")}
    if not of_model:
        return None
    try:
        must_have_weights(run, config, of_model)
    except ValueError as error:
        return str(error)
    return None


def _name(run: str, runs: Sequence[str]) -> str:
    return f"{run}: " if len(runs) > 1 else ""

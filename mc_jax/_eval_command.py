"""The command `mc-jax eval`: runs measured on a text, read as they were trained or otherwise."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mc_jax._arguments import UsageError, must_be_run, parse
from mc_jax.config import AggregationName, Segmentation

if TYPE_CHECKING:
    from mc_jax.data.store import TokenStore
    from mc_jax.evaluation.measurement import Measurement
    from mc_jax.training.run import Run

_STANDARD_ERROR = "_standard_error"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDial:
    """How the memories are read; what is None stays as it was trained."""

    segment_length: int | None = None
    """Tokens after which the memory's state is cached."""
    aggregation: AggregationName | None = None
    """How the online and the cached memories are read together; "none" turns the caches off."""
    top_k: int | None = None
    """Cached memories that "sparse" and "average" read."""
    segmentation: Segmentation | None = None
    """Every segment is a memory, or a token's segments are grouped by the digits of their number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataDial:
    """What is read; what is None stays as it was trained."""

    context_length: int | None = None
    """Tokens in a window."""
    corpus: str | None = None
    """A folder of mc-jax prepare with the run's tokenizer, whose held-out part is read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationDial:
    """How windows are laid; what is None stays as the run's config has it."""

    stride: int | None = None
    """Tokens scored per window of a long document by --mode windows; None: as configured, or half one."""
    batch_size: int | None = None
    """Windows evaluated together; no result depends on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Measure runs on text, by default the held-out text of their corpus, and read as they were trained."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
    ]
    """Folders that mc-jax train wrote, for example runs/quickstart; others are compared with the first."""
    step: int | None = None
    """Step of the checkpoint; None: the newest."""
    mode: Literal["windows", "last-k", "by-position", "stream"] = "windows"
    """Score all tokens in overlapping windows, the last ones of each, by position, or without windows."""
    last_k: int | None = None
    """Tokens that a window of --mode last-k scores; None: half of it."""
    first: int | None = None
    """Where in a document --mode last-k begins to score: the longest window less last-k, if several lengths
    are to score the same tokens; None: this window less last-k."""
    max_cached: int | None = None
    """Places for cached memories in each layer, with --mode stream; None: one for each segment."""
    when_full: Literal["error", "drop-oldest"] = "error"
    """When all places are taken, with --mode stream: stop, or forget the oldest memory."""
    state_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Numbers that cached memories are kept as, with --mode stream; None: as computed."""
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Text to be read instead: .txt (a document a file), .jsonl (a line), both also with .gz, .parquet."""
    text_field: str = "text"
    """Field of .jsonl, or column of .parquet, that has the text."""
    model: ModelDial = ModelDial()
    data: DataDial = DataDial()
    evaluation: EvaluationDial = EvaluationDial()
    output: Path | None = None
    """Folder for RUN.MODE.json, all that was found and how; made if missing."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of a table."""


def evaluate(arguments: Sequence[str]) -> None:
    """Measure runs on held-out or other text, read as they were trained or otherwise."""
    chosen = parse(EvalArguments, arguments, program="mc-jax eval")
    if not chosen.runs:
        raise UsageError(
            "no run is named; write mc-jax eval RUN ..., for example mc-jax eval runs/quickstart"
        )
    for run in chosen.runs:
        must_be_run(run)
    _must_have_effect(chosen)
    files = _files(chosen)

    from mc_jax.data.files import json_text, write_json
    from mc_jax.evaluation.sums import difference

    results = [_measured(run, chosen) for run in chosen.runs]
    differences = [difference(result.sums, results[0].sums) for result in results[1:]]
    for file, result in zip(files, results, strict=bool(files)):
        write_json(file, result.to_json())
    if chosen.json:
        told: list[dict[str, Any]] = [_without_units(result) for result in results]
        for values, found in zip(told[1:], differences, strict=True):
            values["less_the_first"] = {name: estimate.value for name, estimate in found.items()} | {
                f"{name}{_STANDARD_ERROR}": estimate.standard_error for name, estimate in found.items()
            }
        print(json_text(told[0] if len(told) == 1 else told))
        return
    _print(results, differences, title="on held-out text" if not chosen.text else "on the text")
    for file in files:
        print(f"written: {file}")


def _must_have_effect(chosen: EvalArguments) -> None:
    """See that no option is given that another one makes void.

    Raises:
      UsageError: one is.
    """
    if chosen.text and chosen.data.corpus is not None:
        raise UsageError(
            "--data.corpus has no effect with --text, which is read instead; leave one of them out"
        )
    if chosen.text_field != EvalArguments.text_field and not any(
        file.name.endswith((".jsonl", ".jsonl.gz", ".parquet")) for file in chosen.text
    ):
        raise UsageError(
            "--text-field has no effect without a --text that is .jsonl or .parquet; leave it out"
        )
    if chosen.mode != "windows" and chosen.evaluation.stride is not None:
        raise UsageError(f"--evaluation.stride has no effect with --mode {chosen.mode}; leave it out")
    if chosen.mode == "stream" and chosen.data.context_length is not None:
        raise UsageError(
            "--data.context-length has no effect with --mode stream, which has no windows; leave it out"
        )
    if chosen.mode != "stream":
        for name in ("max_cached", "when_full", "state_dtype"):
            if getattr(chosen, name) != getattr(EvalArguments, name):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} has no effect with --mode {chosen.mode}; set --mode stream")
    if chosen.mode != "last-k":
        for option, value in (("--last-k", chosen.last_k), ("--first", chosen.first)):
            if value is not None:
                raise UsageError(f"{option} has no effect with --mode {chosen.mode}; set --mode last-k")


def _files(chosen: EvalArguments) -> list[Path]:
    """Where the results go, none of which is there.

    Raises:
      UsageError: one is, or two would be the same.
    """
    if chosen.output is None:
        return []
    files = [chosen.output / f"{Path(run).name}.{chosen.mode}.json" for run in chosen.runs]
    for place, file in enumerate(files):
        if file in files[:place]:
            raise UsageError(f"two runs are called {Path(chosen.runs[place]).name}; measure them one by one")
        if file.exists():
            raise UsageError(f"{file} is there already; name another folder with --output, or delete it")
    return files


def _measured(folder: str, chosen: EvalArguments) -> "Measurement":
    from etils import epath

    from mc_jax.caching import Storage
    from mc_jax.evaluation.core import measure
    from mc_jax.evaluation.devices import all_devices
    from mc_jax.evaluation.dial import turn, turned_config
    from mc_jax.evaluation.modes import mode_of
    from mc_jax.training.run import load_run, read_config

    changes = _changes(chosen)
    config = read_config(epath.Path(folder))
    turned_config(config, changes)  # what it refuses is told before anything is loaded
    # A stream's caches lie on one device.
    with contextlib.nullcontext() if chosen.mode == "stream" else all_devices(config):
        run = load_run(folder, chosen.step)
        if changes:
            run = turn(run, changes)
        storage = Storage(
            max_cached=chosen.max_cached, when_full=chosen.when_full, state_dtype=chosen.state_dtype
        )
        mode = mode_of(run.config, chosen.mode, last_k=chosen.last_k, first=chosen.first, storage=storage)
        return measure(run, _text(run, chosen), mode)


def _changes(chosen: EvalArguments) -> dict[str, Any]:
    """The settings that are to be others than the run's, by their names."""
    given = {
        f"{section}.{field.name}": getattr(getattr(chosen, section), field.name)
        for section in ("model", "data", "evaluation")
        for field in dataclasses.fields(getattr(chosen, section))
    }
    return {name: value for name, value in given.items() if value is not None and name != "data.corpus"}


def _text(run: "Run", chosen: EvalArguments) -> "TokenStore":
    from mc_jax.data.dataset import open_prepared
    from mc_jax.data.texts import text_store
    from mc_jax.evaluation.core import held_out_text

    if chosen.text:
        return text_store(chosen.text, run.dataset.tokenizer, text_field=chosen.text_field)
    if chosen.data.corpus is not None:
        return held_out_text(open_prepared(Path(chosen.data.corpus).expanduser()), chosen.data.corpus)
    return held_out_text(run.dataset, run.folder)


def _without_units(result: "Measurement") -> dict[str, Any]:
    return {name: value for name, value in result.to_json().items() if name != "units"}


def _print(results: Sequence["Measurement"], differences: Sequence[Mapping[str, Any]], *, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title, *(result.run for result in results))
    figures = [result.figures() for result in results]
    for name in figures[0]:
        if not name.endswith(_STANDARD_ERROR):
            table.add_row(name.replace("_", " "), *(shown(found, name) for found in figures))
    for name in differences[0] if differences else ():
        cells = [
            shown({name: found[name].value, f"{name}{_STANDARD_ERROR}": found[name].standard_error}, name)
            for found in differences
        ]
        table.add_row(f"{name.replace('_', ' ')} less the first's", "", *cells)
    console.print(table)
    for result in results:
        if result.edges:
            by_position = Table("position", "tokens", "loss", "bits per byte", title=result.run)
            for bucket in result.buckets():
                span = f"{bucket['from']:,} to {bucket['to']:,}"
                cells = (shown(bucket, name) for name in ("tokens", "loss", "bits_per_byte"))
                by_position.add_row(span, *cells)
            console.print(by_position)
    hows = {
        result.run: "".join(f", {name.replace('_', ' ')} {value}" for name, value in result.settings.items())
        for result in results
    }
    for how in dict.fromkeys(hows.values()):
        print(f"mode {results[0].mode}{how}; ± is a standard error over {results[0].sums.over}")
    for result in results:
        changed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in result.turned.items())
        if changed:
            print(f"{result.run} is read otherwise than it was trained: {changed}")


def shown(figures: Mapping[str, Any], name: str) -> str:
    """A figure as a cell of a table, with its standard error where there is one."""
    value, error = figures[name], figures.get(f"{name}{_STANDARD_ERROR}")
    if math.isnan(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"

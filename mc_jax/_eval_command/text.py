"""Runs measured on held-out or other text."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_jax._arguments import UsageError
from mc_jax._eval_command.arguments import EvalArguments, mode_name
from mc_jax._eval_command.opened import open_run, settings_of
from mc_jax._eval_command.shown import STANDARD_ERROR, print_turned, shown

if TYPE_CHECKING:
    from mc_jax.data.store import TokenStore
    from mc_jax.evaluation.measurement import Measurement
    from mc_jax.training.run import Run


def measure_text(chosen: EvalArguments) -> None:
    """Measure runs on text, print what was found, and write it where that is asked."""
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
                f"{name}{STANDARD_ERROR}": estimate.standard_error for name, estimate in found.items()
            }
        print(json_text(told[0] if len(told) == 1 else told))
        return
    _print(results, differences, title="on held-out text" if not chosen.text else "on the text")
    for file in files:
        print(f"written: {file}")


def _files(chosen: EvalArguments) -> list[Path]:
    """The files that the results go to, none of which is there.

    Raises:
      UsageError: one is, or two would be the same.
    """
    if chosen.output is None:
        return []
    files = [chosen.output / f"{Path(run).name}.{mode_name(chosen)}.json" for run in chosen.runs]
    for place, file in enumerate(files):
        if file in files[:place]:
            raise UsageError(f"two runs are called {Path(chosen.runs[place]).name}; measure them one by one")
        if file.exists():
            raise UsageError(f"{file} is there already; name another folder with --output, or delete it")
    return files


def _measured(folder: str, chosen: EvalArguments) -> "Measurement":
    from mc_jax.caching import Storage
    from mc_jax.evaluation.core import measure
    from mc_jax.evaluation.devices import all_devices
    from mc_jax.evaluation.modes import mode_of

    mode = mode_name(chosen)
    config = settings_of(folder, chosen)
    # A stream's caches lie on one device.
    with contextlib.nullcontext() if mode == "stream" else all_devices(config):
        run = open_run(folder, chosen)
        storage = Storage(
            max_cached=chosen.max_cached, when_full=chosen.when_full, state_dtype=chosen.state_dtype
        )
        reading = mode_of(run.config, mode, last_k=chosen.last_k, first=chosen.first, storage=storage)
        return measure(run, _text(run, chosen), reading)


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
    table = Table(title, *(result.origin.run for result in results))
    figures = [result.figures() for result in results]
    for name in figures[0]:
        if not name.endswith(STANDARD_ERROR):
            table.add_row(name.replace("_", " "), *(shown(found, name) for found in figures))
    for name in differences[0] if differences else ():
        cells = [
            shown({name: found[name].value, f"{name}{STANDARD_ERROR}": found[name].standard_error}, name)
            for found in differences
        ]
        table.add_row(f"{name.replace('_', ' ')} less the first's", "", *cells)
    console.print(table)
    for result in results:
        if result.edges:
            by_position = Table("position", "tokens", "loss", "bits per byte", title=result.origin.run)
            for bucket in result.buckets():
                span = f"{bucket['from']:,} to {bucket['to']:,}"
                cells = (shown(bucket, name) for name in ("tokens", "loss", "bits_per_byte"))
                by_position.add_row(span, *cells)
            console.print(by_position)
    hows = {
        result.origin.run: "".join(
            f", {name.replace('_', ' ')} {value}" for name, value in result.settings.items()
        )
        for result in results
    }
    for how in dict.fromkeys(hows.values()):
        print(f"mode {results[0].mode}{how}; ± is a standard error over {results[0].sums.over}")
    for result in results:
        print_turned(result.origin.run, result.origin.turned)

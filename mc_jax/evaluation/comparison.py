"""Several runs side by side: what differs in their settings, how they went, how they ended."""

import csv
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from mc_jax import config as configs
from mc_jax.config import Config
from mc_jax.data.files import make_folder, write_text
from mc_jax.evaluation.result import RESULT_FILE
from mc_jax.training.metrics import read_metrics
from mc_jax.training.run import CONFIG_FILE, read_config

PAGE_SUFFIX = ".html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run as its folder tells it, finished or not."""

    name: str
    """What it is called here: its folder's name, or all of its path where two are called alike."""
    folder: epath.Path
    """The run's folder."""
    config: Config
    """Its settings."""
    metrics: Sequence[Mapping[str, Any]]
    """One dict a step, as `read_metrics` gives them."""
    result: Mapping[str, Any]
    """What its `result.json` holds; empty where it has none yet."""

    def values(self) -> dict[str, Any]:
        """What is known of how it went and ended, by name; what is not known is left out.

        Results are those of `result.json`, which were measured at `result_step`.
        """
        last: Mapping[str, Any] = self.metrics[-1] if self.metrics else {}
        router = self.result.get("router") or {}
        layers = router.get("layers") or []
        found = {
            "step": last.get("step", 0),
            "tokens": last.get("tokens"),
            "seconds": last.get("seconds"),
            "training_loss": last.get("loss"),
            "parameters": self.result.get("parameters"),
            "result_step": self.result.get("step"),
        }
        for name, value in (self.result.get("held_out") or {}).items():
            found[f"held_out_{name}"] = value
        for name in ("cached_share", "entropy", "relative_entropy"):
            of_layers = {layer["layer"]: layer[name] for layer in layers}
            if of_layers:
                found[f"router_{name}"] = sum(of_layers.values()) / len(of_layers)
            found |= {f"router_{name}_layer_{layer}": value for layer, value in of_layers.items()}
        return {
            name: value
            for name, value in found.items()
            if value is not None and not (isinstance(value, float) and math.isnan(value))
        }


def read_runs(folders: Sequence[epath.PathLike]) -> list[ComparedRun]:
    """Read the runs to be compared; no checkpoint is opened.

    Raises:
      ValueError: fewer than two, one of them twice, a folder that is no run, or a damaged file.
    """
    paths = [epath.Path(folder) for folder in folders]
    if len(paths) < 2:
        raise ValueError("there is nothing to compare; give at least two folders that mc-jax train wrote")
    seen: dict[str, epath.Path] = {}
    for path in paths:
        if not (path / CONFIG_FILE).exists():
            raise ValueError(f"{path} is no run folder (it has no {CONFIG_FILE}); give one of mc-jax train")
        place = str(path.resolve())
        if place in seen:
            also = "" if str(seen[place]) == str(path) else f", the other time as {seen[place]}"
            raise ValueError(f"{path} is given twice{also}; name each run once")
        seen[place] = path
    names = [path.resolve().name for path in paths]
    return [
        ComparedRun(
            name=name if names.count(name) == 1 else str(path),
            folder=path,
            config=_read_config(path),
            metrics=read_metrics(path),
            result=_read_result(path / RESULT_FILE),
        )
        for name, path in zip(names, paths, strict=True)
    ]


def settings_that_differ(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Each setting that is not the same in all runs, with its value in each of them."""
    values = [configs.to_flat_dict(run.config) for run in runs]
    return {
        name: [of_run[name] for of_run in values]
        for name in values[0]
        if any(of_run[name] != values[0][name] for of_run in values[1:])
    }


class MeasuredAlike(NamedTuple):
    """Whether the results of runs, as far as is known, may be set against each other."""

    tokenizer: bool
    """Loss and perplexity are of the same tokens."""
    text: bool
    """All are of one text."""


def measured_alike(runs: Sequence[ComparedRun]) -> MeasuredAlike:
    """What is the same in the results of runs."""
    tokenizers, texts = (
        {known for run in runs if (known := (run.result.get("hashes") or {}).get(name)) is not None}
        for name in ("tokenizer", "held_out_text")
    )
    sizes = {size for run in runs if (size := run.values().get("held_out_bytes")) is not None}
    # A text's hash is of its tokens, which tokenizers make.
    other_texts = len(sizes) > 1 or (len(texts) > 1 and len(tokenizers) <= 1)
    return MeasuredAlike(tokenizer=len(tokenizers) <= 1, text=not other_texts)


class OverSeeds(NamedTuple):
    """What runs give that differ by their seed alone, and have a result."""

    runs: tuple[int, ...]
    """Their places among all runs; two or more."""
    mean: float
    """Mean of their bits per byte on held-out text."""
    standard_error: float
    """Standard error of that mean: the seeds' standard deviation over the square root of their number."""


def seeds_of(runs: Sequence[ComparedRun]) -> list[OverSeeds]:
    """Each setting that was trained to its result from several seeds."""
    groups: dict[str, dict[int, int]] = {}
    for place, run in enumerate(runs):
        if "held_out_bits_per_byte" in run.values():
            training = dataclasses.replace(run.config.training, seed=0)
            settings = configs.to_json(dataclasses.replace(run.config, training=training))
            groups.setdefault(settings, {})[run.config.training.seed] = place
    found = []
    for places in groups.values():
        bits = [runs[place].values()["held_out_bits_per_byte"] for place in places.values()]
        if len(bits) > 1:
            error = statistics.stdev(bits) / math.sqrt(len(bits))
            found.append(OverSeeds(tuple(places.values()), statistics.fmean(bits), error))
    return found


def caveats(runs: Sequence[ComparedRun]) -> list[str]:
    """Sentences that a reader must know before believing a difference."""
    values = [run.values() for run in runs]
    found = []
    unfinished = [run.name for run, of_run in zip(runs, values, strict=True) if "result_step" not in of_run]
    if unfinished:
        found.append(f"No result yet, as training has not ended: {', '.join(unfinished)}.")
    older = [
        run.name
        for run, of_run in zip(runs, values, strict=True)
        if of_run.get("result_step", of_run["step"]) != of_run["step"]
    ]
    if older:
        found.append(f"Trained on since the result was measured: {', '.join(older)}.")
    same = measured_alike(runs)
    if not same.tokenizer:
        found.append("Tokenizers differ: compare bits per byte, not loss or perplexity, which are per token.")
    if not same.text:
        found.append("Held-out texts differ: a result on one text says nothing about one on another.")
    repeated = {place for group in seeds_of(runs) for place in group.runs}
    alone = [run.name for place, run in enumerate(runs) if place not in repeated]
    if alone:
        which = f" of {', '.join(alone)}" if repeated else " for each setting"
        found.append(f"One seed{which}: what another seed would change is not known here.")
    return found


def write_comparison(
    folders: Sequence[epath.PathLike], output: epath.PathLike
) -> tuple[epath.Path, epath.Path]:
    """Write a page that compares runs, and beside it a table, one row a run; each whole or not at all.

    Args:
      folders: of the runs.
      output: the page, whose name ends in .html; the table's ends in .csv.

    Returns:
      Where the two are.

    Raises:
      ValueError: as `read_runs`, or an output of another name. Nothing is written in these cases.
    """
    output = epath.Path(output)
    if output.suffix != PAGE_SUFFIX:
        raise ValueError(f"the page is to be written to {output}, whose name must end in {PAGE_SUFFIX}")
    runs = read_runs(folders)
    # It imports this module, and matplotlib, which takes seconds.
    from mc_jax.evaluation._comparison_page import comparison_page

    text = comparison_page(runs, settings_that_differ(runs))
    make_folder(output.parent)
    table = output.with_suffix(".csv")
    write_text(table, comparison_csv(runs))
    write_text(output, text)
    return output, table


def comparison_csv(runs: Sequence[ComparedRun]) -> str:
    """One row a run: its name, folder, the settings that differ, and all that is known of it, in full."""
    differing = settings_that_differ(runs)
    values = [run.values() for run in runs]
    known = list(dict.fromkeys(name for of_run in values for name in of_run))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "folder", *differing, *known])
    for place, (run, of_run) in enumerate(zip(runs, values, strict=True)):
        settings = [given[place] for given in differing.values()]
        writer.writerow(
            [run.name, str(run.folder)]
            + [value if isinstance(value, str) else json.dumps(value) for value in settings]
            + [of_run.get(name, "") for name in known]
        )
    return text.getvalue()


def _read_config(path: epath.Path) -> Config:
    try:
        return read_config(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_result(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes().decode(errors="replace"))
    except json.JSONDecodeError as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not the result of a run; mc-jax train, started again, writes it anew")
    return found

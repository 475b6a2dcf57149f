"""What runs recall, as a folder: `results.json`, `samples.jsonl` and `tasks.html`."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import mc_jax
from mc_jax.data.files import new_folder, write_json, write_text
from mc_jax.evaluation.result import commit_of
from mc_jax.evaluation.tasks.page import tasks_page
from mc_jax.evaluation.tasks.results import Recalled, less_the_first

SAMPLES_FILE = "samples.jsonl"
RESULTS_FILE = "results.json"
PAGE_FILE = "tasks.html"


def write_results(found: Sequence[Recalled], folder: Path) -> None:
    """Write what runs recall into a new folder, whole or not at all.

    Raises:
      ValueError: the folder is there already.
    """
    must_be_new(folder)
    with new_folder(folder) as partial:
        write_json(partial / RESULTS_FILE, as_json(found))
        write_text(partial / PAGE_FILE, tasks_page(found))
        lines = (
            json.dumps({"run": one.origin.run, **line}, ensure_ascii=False)
            for one in found
            for result in one.tasks
            for line in result.samples
        )
        write_text(partial / SAMPLES_FILE, "".join(f"{line}\n" for line in lines))


def must_be_new(folder: Path) -> None:
    """See that nothing is overwritten.

    Raises:
      ValueError: the folder is there already.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; give --output another folder, or remove it")


def as_json(found: Sequence[Recalled]) -> dict[str, Any]:
    """Results as JSON values, with all that it takes to ask the same again."""
    runs = [one.to_json() for one in found]
    for values, one in zip(runs[1:], found[1:], strict=True):
        for of_task, result, first in zip(values["tasks"], one.tasks, found[0].tasks, strict=True):
            cells = less_the_first(result, first)
            of_task["less_the_first"] = [dataclasses.asdict(cell) for cell in cells]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit_of(Path(mc_jax.__file__).parents[1]),
        "device": jax.local_devices()[0].device_kind,
        "runs": runs,
    }

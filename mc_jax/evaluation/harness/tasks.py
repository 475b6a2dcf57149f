"""Tasks of lm-eval, by name or by file, asked of a run; its table, and files of it all."""

import contextlib
import importlib.util
import json
import os
import random
import re
import tempfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mc_jax.data.files import json_text, new_folder, write_json, write_text
from mc_jax.data.tokenizer import write_transformers_tokenizer
from mc_jax.evaluation.harness.settings import PREFIX, HarnessSettings
from mc_jax.evaluation.tasks.files import must_be_new
from mc_jax.training.run import Run

RESULTS_FILE = "results.json"


def must_be_installed() -> None:
    """See that lm-eval is there.

    Raises:
      ValueError: it is not.
    """
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(
            "lm-eval, whose tasks are asked for, is not installed: scripts/setup eval, or pip install lm-eval"
        ) from None


def run_harness(run: Run, names: Sequence[str], settings: HarnessSettings) -> dict[str, Any]:
    """Ask a run's model tasks.

    Args:
      run: as it was read back, or turned.
      names: tasks, groups and tags of lm-eval, or YAML files of tasks.
      settings: how they are asked.

    Returns:
      lm-eval's results with all samples; "config" has what `HarnessModel.get_model_info` tells.

    Raises:
      ValueError: as of `check_names`; settings out of range or without effect, a task that lm-eval does not
        know or cannot load, or a model whose predictions are not finite.
    """
    check_names(names)
    for name in ("limit", "stride"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ValueError(f"{name} is {value}; set it to 1 or more")
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        raise ValueError(f"num_fewshot is {settings.num_fewshot}; set it to 0 or more")
    from lm_eval import simple_evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.tasks import TaskManager

    from mc_jax.evaluation.harness.model import HarnessModel

    with tempfile.TemporaryDirectory() as folder:
        # What tasks are told that measure their prompts.
        metadata: dict[str, Any] = {"tokenizer": folder}
        write_transformers_tokenizer(run.dataset.tokenizer, Path(folder))
        if settings.lengths:
            metadata["max_seq_lengths"] = list(settings.lengths)
        # lm-eval's own tasks are thousands of files, which take seconds to read.
        manager = TaskManager(include_defaults=not all(map(_is_file, names)), metadata=metadata)
        # As lm-eval does before it loads tasks, some of which draw their documents then.
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        tasks = _load(manager, names, settings)
    model = HarnessModel(run, stride=settings.stride)
    with _one_process():
        results = simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            batch_size=model.batch_size,
        )
    assert results is not None, "this is the only process"
    return dict(results)


def check_names(names: Sequence[str]) -> None:
    """See that lm-eval and the files are there.

    Raises:
      ValueError: they are not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "lm-eval, whose tasks are asked for, is not installed: scripts/setup eval, or pip install lm-eval"
        )
    for name in names:
        if _is_file(name) and not Path(name).expanduser().is_file():
            raise ValueError(f"there is no file {name}; a task's file is given as {PREFIX}PATH.yaml")


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _load(manager: Any, names: Sequence[str], settings: HarnessSettings) -> list[Any]:
    """Tasks and groups with their data; those of a hub are downloaded where they are not there.

    Raises:
      ValueError: one is unknown or cannot be loaded, or a setting has no effect on any.
    """
    for name in names:
        if not _is_file(name) and name not in manager.task_index:
            raise ValueError(
                f"lm-eval has no task {name!r}; lm_eval ls tasks lists all; a file of your own is given as "
                f"{PREFIX}PATH.yaml"
            )
    loaded, leaves = [], []
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # of whatever library reads the data
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"lm-eval cannot load the task {name}: {reason}") from error
        leaves += found["tasks"].values()
        below = {child for children in found["group_map"].values() for child in children}
        loaded += [group for key, group in found["groups"].items() if key not in below]
        loaded += [task for key, task in found["tasks"].items() if key not in below]
    if settings.lengths and all(task.config.custom_dataset is None for task in leaves):
        raise ValueError(
            f"lengths have no effect on {', '.join(names)}: no prompt is made there; leave them out"
        )
    if settings.stride is not None and all(task.OUTPUT_TYPE != "loglikelihood_rolling" for task in leaves):
        raise ValueError(f"stride has no effect on {', '.join(names)}: no whole text is scored; leave it out")
    return loaded


def table(results: Mapping[str, Any]) -> str:
    """lm-eval's own table of results."""
    from lm_eval.utils import make_table

    text = make_table(results)
    return f"{text}\n{make_table(results, 'groups')}" if results.get("groups") else text


def write_harness(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write `results.json` and `samples_TASK.jsonl` into a new folder, whole or not at all.

    Args:
      results: lm-eval's, by run; those of several go to a folder each.
      folder: where to.

    Raises:
      ValueError: the folder is there already.
    """
    must_be_new(folder)
    with new_folder(folder) as partial:
        for run, found in results.items():
            place = partial / run if len(results) > 1 else partial
            write_json(place / RESULTS_FILE, without_samples(found))
            for name, samples in found["samples"].items():
                lines = [json_text(_plain(sample)) for sample in samples]
                safe = re.sub(r"[^\w.-]", "_", name)
                write_text(place / f"samples_{safe}.jsonl", "".join(f"{line}\n" for line in lines))


def without_samples(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results of lm-eval as JSON values."""
    return _plain({name: value for name, value in results.items() if name != "samples"})


def _plain(values: Any) -> Any:
    """A value as JSON has it; a function or the like as it prints."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(values, default=handle_non_serializable))


@contextlib.contextmanager
def _one_process() -> Generator[None]:
    """Have lm-eval draw its bootstrap samples here: a process with JAX's threads may not survive a fork."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before

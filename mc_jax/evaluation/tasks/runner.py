"""Tasks run on a model: samples drawn, judged, and summed up by length and depth; files of it all."""

import collections
import dataclasses
import datetime
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mc_jax
from mc_jax.data.files import json_text, new_folder, write_json, write_text
from mc_jax.evaluation.result import checkpoint_hash, commit_of
from mc_jax.evaluation.tasks import TASKS
from mc_jax.evaluation.tasks.page import tasks_page
from mc_jax.evaluation.tasks.results import Cell, Mean, TaskResult, TaskSettings
from mc_jax.evaluation.tasks.sample import (
    Ask,
    RowSample,
    Sample,
    Task,
    TextSample,
    TextTask,
    TooShort,
    sha256,
)
from mc_jax.evaluation.tasks.scoring import Judge, generations, likelihoods, recalls
from mc_jax.training.run import Run
from mc_jax.training.seal import make_seal

SAMPLES_FILE = "samples.jsonl"
RESULTS_FILE = "results.json"
PAGE_FILE = "tasks.html"


def run_task(run: Run, settings: TaskSettings, *, told: Callable[[str], None] = lambda _: None) -> TaskResult:
    """Ask a run's model the samples of a task.

    Args:
      run: as it was read back.
      settings: task, lengths, samples.
      told: hears a line on each length that is done.

    Raises:
      ValueError: settings out of range or without effect, a length that is too short, or a model whose
        predictions are not finite.
    """
    check_settings(settings)
    task = TASKS[settings.task]
    tokenizer = run.dataset.tokenizer
    judge = Judge(model=run.model, tokenizer=tokenizer, batch_size=settings.batch_size)
    asks = {
        length: [
            Ask(
                tokenizer=tokenizer,
                length=length,
                index=index,
                seed=settings.seed,
                alternatives=settings.alternatives,
                documents=settings.documents,
            )
            for index in range(settings.samples)
        ]
        for length in settings.lengths
    }
    # All are drawn before the first is read: a length that is too short is refused at once.
    drawn = {length: _drawn(task, group) for length, group in asks.items()}
    lines: list[dict[str, Any]] = []
    for length, samples in drawn.items():
        if isinstance(task, TextTask):
            texts = [sample for sample in samples if isinstance(sample, TextSample)]
            lines += _text_lines(judge, task, texts, length, generate=settings.generate)
        else:
            rows = [sample for sample in samples if isinstance(sample, RowSample)]
            lines += _row_lines(judge, task.name, rows, length)
        told(f"{task.name}: {len(samples)} samples of {length:,} tokens are done")
    return TaskResult(
        settings=settings,
        metric=task.metric if isinstance(task, TextTask) else "share of the places",
        cells=tuple(_cells(lines)),
        samples=tuple(lines),
        prompts_sha256=sha256("".join(line["prompt_sha256"] for line in lines)),
    )


def _drawn(task: Task, asks: Sequence[Ask]) -> list[Sample]:
    """All samples of a length.

    Raises:
      TooShort: some have no room; it names what the longest of them needs.
    """
    found, needed = [], []
    for ask in asks:
        try:
            found.append(task.draw(ask))
        except TooShort as error:
            needed.append(error.needed)
    if needed:
        raise TooShort(asks[0].length, max(needed))
    return found


def check_settings(settings: TaskSettings) -> None:
    """See that a task can be run as asked.

    Raises:
      ValueError: an unknown task, a number out of range, or a setting without effect.
    """
    if settings.task not in TASKS:
        raise ValueError(f"there is no task {settings.task!r}; known are {', '.join(TASKS)}")
    for name in ("samples", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; set it to 1 or more")
    for name in ("seed", "alternatives"):
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} is {getattr(settings, name)}; set it to 0 or more")
    if (
        not settings.lengths
        or min(settings.lengths) < 1
        or len(set(settings.lengths)) < len(settings.lengths)
    ):
        raise ValueError(f"lengths are {settings.lengths}; give one or more, each once, of 1 token or more")
    task = TASKS[settings.task]
    if settings.documents is not None:
        if not (isinstance(task, TextTask) and task.reads_documents):
            raise ValueError(f"documents have no effect on the task {task.name}; leave them out")
        if not settings.documents.is_file():
            raise ValueError(f"there is no file {settings.documents}; give a JSONL file of documents")


def write_results(run: Run, results: Sequence[TaskResult], folder: Path) -> None:
    """Write `results.json`, `samples.jsonl` and `tasks.html` into a new folder, whole or not at all.

    Raises:
      ValueError: the folder is there already.
    """
    must_be_new(folder)
    with new_folder(folder) as partial:
        write_json(partial / RESULTS_FILE, describe(run, results))
        lines = [json.dumps(line, ensure_ascii=False) for result in results for line in result.samples]
        write_text(partial / PAGE_FILE, tasks_page(run.folder.name, results))
        write_text(partial / SAMPLES_FILE, "".join(f"{line}\n" for line in lines))


def must_be_new(folder: Path) -> None:
    """See that nothing is overwritten.

    Raises:
      ValueError: the folder is there already.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; give --output another folder, or remove it")


def describe(run: Run, results: Sequence[TaskResult]) -> dict[str, Any]:
    """Results as JSON, with all that it takes to ask the same again."""
    seal = make_seal(run.config, run.dataset)
    return {
        "run": run.folder.name,
        "step": run.step,
        "hashes": {"checkpoint": checkpoint_hash(run), "tokenizer": seal["tokenizer"]},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit_of(Path(mc_jax.__file__).parents[1]),
        "device": jax.local_devices()[0].device_kind,
        "tasks": [
            {
                **{name: _plain(value) for name, value in dataclasses.asdict(result.settings).items()},
                "metric": result.metric,
                "prompts_sha256": result.prompts_sha256,
                "sources": result.sources(),
                "cells": [dataclasses.asdict(cell) for cell in result.cells],
            }
            for result in results
        ],
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _text_lines(
    judge: Judge, task: TextTask, samples: list[TextSample], length: int, *, generate: bool
) -> list[dict[str, Any]]:
    likely = likelihoods(judge, samples, length - 1)
    said = generations(judge, task, samples) if generate else [None] * len(samples)
    return [
        {
            **_common(task.name, index, length, sample),
            "depth": sample.depth,
            "prompt": sample.prompt,
            "answers": list(sample.answers),
            "alternatives": list(sample.alternatives),
            "prompt_sha256": sha256(sample.prompt),
            **({} if generated is None else {"generated": generated[0].text}),
            "scores": {
                **({} if generated is None else {task.metric: generated[1]}),
                "ranked first": float(likelihood.rank == 1),
                "greedy": float(likelihood.is_greedy),
                "log-likelihood": likelihood.log_likelihood,
            },
            "rank": likelihood.rank,
        }
        for index, (sample, likelihood, generated) in enumerate(zip(samples, likely, said, strict=True))
    ]


def _row_lines(judge: Judge, name: str, samples: list[RowSample], length: int) -> list[dict[str, Any]]:
    return [
        {
            **_common(name, index, length, sample),
            "prompt": sample.tokens.tolist(),
            "places": sample.places.tolist(),
            "answers": sample.targets.tolist(),
            "prompt_sha256": sha256(sample.tokens.astype("<i4").tobytes()),
            "scores": {
                "right": recall.share,
                "ranked first": recall.ranked_share,
                "log-likelihood": recall.log_likelihood,
            },
        }
        for index, (sample, recall) in enumerate(zip(samples, recalls(judge, samples, length), strict=True))
    ]


def _common(name: str, index: int, length: int, sample: TextSample | RowSample) -> dict[str, Any]:
    return {
        "task": name,
        "index": index,
        "length": length,
        "tokens": len(sample.tokens),
        "sources": dict(sample.sources),
        "labels": dict(sample.labels),
    }


def _cells(lines: Sequence[dict[str, Any]]) -> list[Cell]:
    groups: dict[tuple[int, float | None], list[dict[str, float]]] = collections.defaultdict(list)
    for line in lines:
        groups[line["length"], None].append(line["scores"])
        if "depth" in line:
            groups[line["length"], round(line["depth"], 1)].append(line["scores"])
    order = sorted(groups, key=lambda key: (key[1] is not None, key[0], key[1] or 0.0))
    return [
        Cell(
            length=length,
            depth=depth,
            samples=len(groups[length, depth]),
            means={
                name: mean([scores[name] for scores in groups[length, depth]])
                for name in groups[length, depth][0]
            },
        )
        for length, depth in order
    ]


def mean(values: Sequence[float]) -> Mean:
    """The mean with its standard error: the spread of the samples over the root of their number."""
    count = len(values)
    error = None if count < 2 else float(np.std(values, ddof=1)) / math.sqrt(count)
    return Mean(value=float(np.mean(values)), stderr=error)


def results_text(run: Run, results: Sequence[TaskResult]) -> str:
    """Results as one JSON object in a line."""
    return json_text(describe(run, results))

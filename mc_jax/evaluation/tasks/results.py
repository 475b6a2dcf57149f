"""What became of tasks: means with standard errors by length and depth, and what several runs differ in."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mc_jax.evaluation.origin import Origin
from mc_jax.evaluation.recall import RecallSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over samples."""

    value: float
    stderr: float | None
    """Standard error; None with one sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Results of the samples of one length, of all depths or of one."""

    length: int
    """The length that was asked for, in tokens."""
    depth: float | None
    """In tenths; None: all samples of the length."""
    samples: int
    means: dict[str, Mean]
    """Means by the name of what was measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a model is worth in a task."""

    task: str
    """A name in `TASKS`."""
    settings: RecallSettings
    """How it was asked, the lengths filled in."""
    metric: str
    """How generated text was judged."""
    cells: tuple[Cell, ...]
    """A cell for each length, then one for each length and depth."""
    samples: tuple[dict[str, Any], ...]
    """One JSON object a sample: prompt, answers, scores, hashes."""
    prompts_sha256: str
    """SHA-256 over all prompts: equal where the same was asked."""

    def sources(self) -> dict[str, list[str]]:
        """Origins of the samples' texts and words, by what they are."""
        found: dict[str, set[str]] = collections.defaultdict(set)
        for line in self.samples:
            for kind, source in line["sources"].items():
                found[kind].add(source)
        return {kind: sorted(names) for kind, names in found.items()}

    def to_json(self) -> dict[str, Any]:
        """JSON values, without the samples."""
        settings = dataclasses.asdict(self.settings)
        return {
            "task": self.task,
            **{name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
            "metric": self.metric,
            "prompts_sha256": self.prompts_sha256,
            "sources": self.sources(),
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recalled:
    """What a run's model is worth in tasks."""

    origin: Origin
    """The weights, and how they were asked."""
    tasks: tuple[TaskResult, ...]
    """One result a task, in the order in which they were asked."""

    def to_json(self) -> dict[str, Any]:
        """JSON values, without the samples."""
        return {**self.origin.to_json(), "tasks": [one.to_json() for one in self.tasks]}


def cells_of(lines: Sequence[Mapping[str, Any]]) -> tuple[Cell, ...]:
    """Means over samples, by length and then by length and depth.

    Args:
      lines: one a sample, with length, scores, and depth where the answer has one.
    """
    groups: dict[tuple[int, float | None], list[Mapping[str, float]]] = collections.defaultdict(list)
    for line in lines:
        groups[line["length"], None].append(line["scores"])
        if "depth" in line:
            groups[line["length"], round(line["depth"], 1)].append(line["scores"])
    order = sorted(groups, key=lambda key: (key[1] is not None, key[0], key[1] or 0.0))
    return tuple(
        Cell(
            length=length,
            depth=depth,
            samples=len(groups[length, depth]),
            means=_means(groups[length, depth]),
        )
        for length, depth in order
    )


def _means(samples: Sequence[Mapping[str, float]]) -> dict[str, Mean]:
    """The mean of each score over the samples that have it."""
    names = dict.fromkeys(name for scores in samples for name in scores)
    return {name: mean([scores[name] for scores in samples if name in scores]) for name in names}


def less_the_first(result: TaskResult, first: TaskResult) -> tuple[Cell, ...]:
    """The mean difference of two runs that were asked the same, sample by sample, at each length.

    None where the prompts differ, as they do between runs of two tokenizers.
    """
    if result.prompts_sha256 != first.prompts_sha256:
        return ()
    lines = [
        {
            "length": line["length"],
            "scores": {
                name: score - other["scores"][name]
                for name, score in line["scores"].items()
                if name in other["scores"]
            },
        }
        for line, other in zip(result.samples, first.samples, strict=True)
    ]
    return cells_of(lines)


def mean(values: Sequence[float]) -> Mean:
    """The mean with its standard error: the spread of the samples over the root of their number."""
    count = len(values)
    error = None if count < 2 else float(np.std(values, ddof=1)) / math.sqrt(count)
    return Mean(value=float(np.mean(values)), stderr=error)

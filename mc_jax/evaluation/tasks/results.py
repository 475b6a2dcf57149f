"""What is asked of a model in a task, and what became of it."""

import collections
import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What is asked of a model."""

    task: str
    """A name in `TASKS`."""
    lengths: tuple[int, ...]
    """Tokens of prompt and answer together, at most."""
    samples: int = 20
    """Of each length."""
    seed: int = 0
    """Draws the samples."""
    alternatives: int = 9
    """Wrong answers that the right one is ranked among."""
    batch_size: int = 8
    """Samples read together."""
    documents: Path | None = None
    """JSONL file for tasks that read documents; None: generated ones."""
    generate: bool = True
    """Whether text is generated, too; log-likelihoods are always there."""


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
    """As asked."""
    depth: float | None
    """In tenths; None: all samples of the length."""
    samples: int
    means: dict[str, Mean]
    """By the name of what was measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a model is worth in a task."""

    settings: TaskSettings
    metric: str
    """How generated text was judged."""
    cells: tuple[Cell, ...]
    """Of each length, then of each length and depth."""
    samples: tuple[dict[str, Any], ...]
    """One JSON object a sample: prompt, answers, scores, hashes."""
    prompts_sha256: str
    """SHA-256 over all prompts: equal where the same was asked."""

    def sources(self) -> dict[str, list[str]]:
        """Where the samples' texts and words come from, by what they are."""
        found: dict[str, set[str]] = collections.defaultdict(set)
        for line in self.samples:
            for kind, source in line["sources"].items():
                found[kind].add(source)
        return {kind: sorted(names) for kind, names in found.items()}

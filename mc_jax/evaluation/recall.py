"""What is asked of a model in tasks of recall; light to import, for commands that have yet to be parsed."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallSettings:
    """How tasks are asked; each task has samples of each length."""

    length: tuple[int, ...] = ()
    """Tokens of prompt and answer together, at most; without it, the context length of training."""
    samples: int = 20
    """Samples of each task and length."""
    seed: int = 0
    """Draws the samples."""
    alternatives: int = 9
    """Wrong answers that the right one is ranked among by log-likelihood."""
    documents: Path | None = None
    """JSONL file (text, key, value) for the task key-value; None: generated documents."""
    generate: bool = True
    """Generate text, too; without it log-likelihoods alone, which is faster."""

"""What a task is, and the samples that it draws: pure functions of a seed, a number and a length.

Shapes: T tokens, P places that are asked about, C candidates.
"""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mc_jax.data.tokenizer import Tokenizer
from mc_jax.evaluation.tasks.metrics import MetricName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What a sample is asked to be; a task answers the same ask with the same sample."""

    tokenizer: Tokenizer
    """The run's own: lengths are measured with it."""
    length: int
    """Tokens that prompt and answer take at most, the separator before the prompt among them."""
    index: int
    """The sample's number, 0 or more."""
    seed: int = 0
    """Another seed draws other samples."""
    alternatives: int = 9
    """Wrong answers that the right one is ranked among."""
    documents: Path | None = None
    """A JSONL file of documents with a key and its value; None: they are generated."""

    def random(self, task: str) -> np.random.Generator:
        """The generator that a task draws this sample from: samples of all lengths ask for the same."""
        return np.random.default_rng((self.seed, self.index, zlib.crc32(task.encode())))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSample:
    """A text to go on from, and what should come."""

    prompt: str
    """The text, without the separator that begins it."""
    tokens: np.ndarray
    """Separator and prompt, int32 [T]."""
    answers: tuple[str, ...]
    """What is right, without the space before it; which of them, or all, is the metric's."""
    alternatives: tuple[str, ...]
    """What is wrong, to be ranked with the first answer by log-likelihood."""
    depth: float
    """The answer's place, from 0, the context's beginning, to 1."""
    sources: Mapping[str, str]
    """Origins of the text and the words, by what they are."""
    needle: tuple[int, int] | None = None
    """First character of the part that tells the answer, and the one after the last; None: unknown."""
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else tells samples apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSample:
    """A row of tokens with places at which the next token is asked for."""

    tokens: np.ndarray
    """int32 [T]."""
    places: np.ndarray
    """int32 [P], increasing."""
    targets: np.ndarray
    """The token that is right at each place, int32 [P]."""
    candidates: np.ndarray
    """Tokens that a target is ranked among, the targets' own included, int32 [C]."""
    sources: Mapping[str, str]
    """Origin of the tokens."""
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else tells samples apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask:
    """A task whose samples are text; it is judged by what is generated and by log-likelihood."""

    name: str
    """The name that users type."""
    summary: str
    """What is asked, in a line."""
    draw: Callable[[Ask], TextSample]
    """The sample of an ask."""
    metric: MetricName
    """How generated text is judged."""
    new_tokens: int
    """Tokens that are generated at most; each sample leaves room for them."""
    stops_at_newline: bool = False
    """Whether a newline ends the answer; the separator always does."""
    reads_documents: bool = False
    """Whether `Ask.documents` has an effect."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowTask:
    """A task whose samples are rows of tokens; it is judged at their places, all in one forward pass."""

    name: str
    """The name that users type."""
    summary: str
    """What is asked, in a line."""
    draw: Callable[[Ask], RowSample]
    """The sample of an ask."""


_PROBE = 16  # units whose size is measured first
_FLAT = 1e-3  # tokens of a unit, at least


class TooShort(ValueError):
    """A sample has no room in the length that is asked of it.

    Args:
      length: as asked.
      needed: tokens that the sample takes at least.
    """

    def __init__(self, length: int, needed: int):
        super().__init__(
            f"a length of {length} tokens is too short: the shortest prompt with its answer has {needed}; "
            f"set --recall.length to {needed} or more"
        )
        self.needed = needed


type Sample = TextSample | RowSample
type Task = TextTask | RowTask


def prompt_tokens(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The separator, which begins every document, and the tokens of a text, int32."""
    return np.concatenate([[tokenizer.separator_id], tokenizer.encode(text)]).astype(np.int32)


def answer_tokens(tokenizer: Tokenizer, answer: str) -> np.ndarray:
    """The tokens of an answer after its prompt, int32: a space stands between them."""
    return tokenizer.encode(" " + answer)


def place_of(part: str, prompt: str) -> tuple[int, int]:
    """A part's first place in a prompt: its first character, and the one after its last."""
    start = prompt.index(part)
    return start, start + len(part)


def fit(
    render: Callable[[int], str], ask: Ask, reserved: int, *, least: int = 0, most: int | None = None
) -> tuple[str, np.ndarray]:
    """The longest prompt that leaves room for an answer, with its tokens.

    Args:
      render: the prompt with so many units of filling text; more units hardly ever make it shorter.
      ask: length and tokenizer.
      reserved: tokens that are left for the answer.
      least: units that a prompt has at least.
      most: units that there are; None: there is no end to them.

    Raises:
      TooShort: the prompt with the least filling text is too long.
    """
    room = ask.length - reserved

    @functools.cache
    def rendered(units: int) -> tuple[str, np.ndarray]:
        text = render(units)
        return text, prompt_tokens(ask.tokenizer, text)

    def size(units: int) -> int:
        return len(rendered(units)[1])

    shortest = size(least)
    if shortest > room:
        raise TooShort(ask.length, shortest + reserved)
    # Between `low`, which fits, and `high`, which does not or is not there; the slope says where to look.
    low, high = least, None if most is None else most + 1
    probe = least + _PROBE if most is None else min(least + _PROBE, most)
    slope = max(_FLAT, (size(probe) - shortest) / _PROBE)
    halve = False
    while high is None or high - low > 1:
        guess = low + max(1, int((room - size(low)) / slope))
        if high is not None:
            guess = (low + high) // 2 if halve else min(guess, high - 1)
            halve = not halve
        if size(guess) <= room:
            low = guess
        else:
            high = guess
            slope = max(_FLAT, (size(high) - size(low)) / (high - low))
    return rendered(low)


def sha256(text: str | bytes) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()

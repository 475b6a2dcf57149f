"""How generated text is judged against the right answers: numbers from 0 to 1."""

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mc_jax.data.tokenizer import Tokenizer

MetricName = Literal["contains-all", "contains-any", "exact", "first-token"]


class Generated(NamedTuple):
    """What a model said, up to where it stopped."""

    text: str
    tokens: np.ndarray
    """int32."""
    tokenizer: Tokenizer


def contains_all(said: Generated, answers: Sequence[str]) -> float:
    """Share of the answers that occur, whatever their case (RULER's string_match_all)."""
    text = _plain(said.text)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def contains_any(said: Generated, answers: Sequence[str]) -> float:
    """Whether one of the answers occurs, whatever its case (Based's "contains")."""
    text = _plain(said.text)
    return float(any(answer.lower() in text for answer in answers))


def exact(said: Generated, answers: Sequence[str]) -> float:
    """Whether an answer is what was said first, in as many tokens as the answer has."""

    def is_said(answer: str) -> bool:
        count = len(said.tokenizer.encode(" " + answer))
        return said.tokenizer.decode(said.tokens[:count]).strip() == answer

    return float(any(is_said(answer) for answer in answers))


def first_token(said: Generated, answers: Sequence[str]) -> float:
    """Whether the first token is that of an answer."""
    firsts = {int(said.tokenizer.encode(" " + answer)[0]) for answer in answers}
    return float(said.tokens.size > 0 and int(said.tokens[0]) in firsts)


def _plain(text: str) -> str:
    # RULER replaces what does not print before it looks for answers.
    return re.sub(r"[\x00-\x1f]", "\n", text).strip().lower()


METRICS: dict[MetricName, Callable[[Generated, Sequence[str]], float]] = {
    "contains-all": contains_all,
    "contains-any": contains_any,
    "exact": exact,
    "first-token": first_token,
}

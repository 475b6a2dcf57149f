"""SQuAD as a cloze: paragraphs, then a sentence of one of them again, up to the answer.

Based's SQuAD (arXiv:2402.18668) has its questions reworded to such stems by a language model, and is not to
be had without a download. Here the stem is the sentence of the paragraph that holds the answer, as it stands
there. Other paragraphs fill up the length.
"""

import numpy as np

from mc_jax.evaluation.tasks.sample import Ask, TextSample, TextTask, TooShort, fit
from mc_jax.evaluation.tasks.sources import Passage, cloze_passages

_NEW_TOKENS = 48
_TRIES = 200


def cloze_prompt(passage: Passage, before: list[str], after: list[str]) -> str:
    """Paragraphs, a line each, and the passage's sentence up to its answer."""
    return "\n".join([*before, passage.text, *after, passage.stem])


def draw(ask: Ask) -> TextSample:
    """A sample: the passage with the answer stands at a random place among others.

    Raises:
      TooShort: no passage is short enough.
    """
    random = ask.random("squad-cloze")
    passages, source = cloze_passages()
    share = float(random.random())
    order = random.permutation(len(passages))
    needed = []
    for number in order[:_TRIES]:
        passage = passages[number]
        others = _others(passages, passage, order, ask.length)

        def render(units: int, passage: Passage = passage, others: list[str] = others) -> str:
            before = round(share * units)
            return cloze_prompt(passage, others[:before], others[before:units])

        try:
            prompt, tokens = fit(render, ask, _NEW_TOKENS, most=len(others))
        except TooShort as error:
            needed.append(error.needed)
            continue
        return TextSample(
            prompt=prompt,
            tokens=tokens,
            answers=passage.answers,
            alternatives=_alternatives(random, passages, passage, ask.alternatives),
            depth=prompt.index(passage.text) / len(prompt),
            sources={"passages": source},
        )
    raise TooShort(ask.length, min(needed))


def _others(passages: list[Passage], passage: Passage, order: np.ndarray, most: int) -> list[str]:
    """Paragraphs of others, each once, in random order, in which no answer is found."""
    found: dict[str, None] = {}
    answer = passage.answers[0].lower()
    for number in order:
        text = passages[number].text
        if text != passage.text and answer not in text.lower():
            found[text] = None
        if len(found) * _WORDS >= most:
            break
    return list(found)


_WORDS = 20  # of a paragraph, at least: as many tokens


def _alternatives(
    random: np.random.Generator, passages: list[Passage], passage: Passage, count: int
) -> tuple[str, ...]:
    """Answers of other passages, at most as many as there are."""
    others = sorted({other.answers[0] for other in passages} - set(passage.answers))
    return tuple(str(other) for other in random.choice(others, min(count, len(others)), replace=False))


SQUAD_CLOZE = TextTask(
    name="squad-cloze",
    summary="the end of a sentence that a paragraph has told",
    draw=draw,
    metric="contains-any",
    new_tokens=_NEW_TOKENS,
    stops_at_newline=True,
)

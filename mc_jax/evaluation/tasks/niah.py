"""RULER's needles in a haystack: S-NIAH-1, S-NIAH-2, S-NIAH-3 and MK-NIAH-1.

Templates, needles, noise and settings are RULER's (arXiv:2404.06654; NVIDIA/RULER at c3f5e3b,
scripts/data/synthetic, scripts/synthetic.yaml). Three things differ, and show in no template: each sample has
as much haystack as fits it, where RULER takes one size for all; sentences of the essays end at full stops,
where RULER asks NLTK; and samples are drawn by another random generator.
"""

import dataclasses
import functools
import uuid
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mc_jax.evaluation.tasks.sample import Ask, TextSample, TextTask, fit, place_of
from mc_jax.evaluation.tasks.sources import NOISE, NOISE_SOURCE, essays, names, sentences

TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
)
"""RULER's template as published, in the plural."""
ANSWER_PREFIX = " The special magic {type_needle_v} for {query} mentioned in the provided text are"
"""What RULER puts after its template, in the plural."""
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
"""RULER's needle, which stays in the plural."""
NEW_TOKENS = 128
"""Tokens that RULER generates."""

_DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What RULER's settings say of a task."""

    name: str
    haystack: Literal["noise", "essay"]
    values: Literal["numbers", "uuids"] = "numbers"
    needles: int = 1


def niah_prompt(values: str, context: str, query: str) -> str:
    """RULER's prompt for one value of one key: its template turned to the singular, its prefix after it.

    Args:
      values: what needles hold, "numbers" or "uuids".
      context: the haystack with the needles in it.
      query: the key that is asked for.
    """
    template = TEMPLATE + ANSWER_PREFIX
    for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is")):
        template = template.replace(plural, singular)
    return template.format(type_needle_v=values.removesuffix("s"), context=context, query=query)


def in_noise(repeats: int, needles: Sequence[str], places: Sequence[int]) -> str:
    """The noise so many times, each on its line, with needles before the lines of these numbers.

    Args:
      repeats: lines without the needles.
      needles: as many as places.
      places: which lines; the first needle is put at the last place.
    """
    lines = [NOISE] * repeats
    for place, needle in zip(sorted(places, reverse=True), needles, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)


def in_sentences(text: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """Sentences of a text with needles between them, joined by spaces.

    Args:
      text: the sentences.
      needles: as many as depths.
      depths: per cent of the sentences that stand before a needle; the first needle has the lowest.
    """
    begin, parts = 0, []
    for depth, needle in zip(sorted(depths), needles, strict=True):
        place = int(len(text) * (depth / 100))
        parts += [" ".join(text[begin:place]), needle]
        begin = place
    return " ".join([*parts, " ".join(text[begin:])])


def draw(kind: Kind, ask: Ask) -> TextSample:
    """A sample of RULER's definition, as long as it may be."""
    random = ask.random(kind.name)
    keys = names().draw(random, kind.needles)
    drawn = _values(random, kind.values, kind.needles + ask.alternatives)
    values, others = drawn[: kind.needles], drawn[kind.needles :]
    needles = [
        NEEDLE.format(type_needle_v=kind.values, key=key, value=value)
        for key, value in zip(keys, values, strict=True)
    ]
    order = random.permutation(kind.needles)
    shuffled = [needles[place] for place in order]
    depths = sorted(int(depth) for depth in random.choice(_DEPTHS, kind.needles, replace=False))
    share = float(random.random())
    asked = int(random.integers(kind.needles))

    def render(units: int) -> str:
        if kind.haystack == "noise":
            context = in_noise(units, shuffled, [int(share * units)])
        else:
            context = in_sentences(sentences(essays().first(units)), shuffled, depths)
        return niah_prompt(kind.values, context, keys[asked])

    prompt, tokens = fit(render, ask, NEW_TOKENS, least=1)
    # The other needles' values are the hardest to tell from the right one, so they come first.
    wrong = [value for place, value in enumerate(values) if place != asked] + others
    depth = share if kind.haystack == "noise" else depths[int(np.argmax(order == asked))] / 100
    return TextSample(
        prompt=prompt,
        tokens=tokens,
        answers=(values[asked],),
        alternatives=tuple(wrong[: ask.alternatives]),
        depth=depth,
        sources={
            "haystack": NOISE_SOURCE if kind.haystack == "noise" else essays().source,
            "keys": names().source,
        },
        needle=place_of(needles[asked], prompt),
        labels={"key": keys[asked]},
    )


def _values(random: np.random.Generator, kind: str, count: int) -> list[str]:
    """Numbers of seven digits, or UUIDs of version 4, no two alike."""
    if kind == "numbers":
        found: dict[str, None] = {}
        while len(found) < count:
            found[str(random.integers(10**6, 10**7))] = None
        return list(found)
    return [str(uuid.UUID(bytes=random.bytes(16), version=4)) for _ in range(count)]


def _task(kind: Kind, summary: str) -> TextTask:
    return TextTask(
        name=kind.name,
        summary=summary,
        draw=functools.partial(draw, kind),
        metric="contains-all",
        new_tokens=NEW_TOKENS,
    )


NIAH = (
    _task(Kind(name="s-niah-1", haystack="noise"), "RULER: a number in repeated sentences"),
    _task(Kind(name="s-niah-2", haystack="essay"), "RULER: a number in essays"),
    _task(Kind(name="s-niah-3", haystack="essay", values="uuids"), "RULER: a UUID in essays"),
    _task(Kind(name="mk-niah-1", haystack="essay", needles=4), "RULER: one of four numbers in essays"),
)

"""Recall in text: lists of names, each with a word, and the same names again, whose words alone are learned.

    Emma garden
    Harriet letter
    Harriet letter
    Emma garden

The first two lines tell, the others ask: only who kept what was told knows the word after a name. It is
associative recall (MQAR, arXiv:2312.04927) in words that a tokenizer reads and a person too.
"""

import random as randoms
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from mc_jax.data.documents import Document

NAMES = (
    "Anne",
    "Augusta",
    "Bertha",
    "Caroline",
    "Catherine",
    "Charles",
    "Charlotte",
    "Diana",
    "Edmund",
    "Edward",
    "Eleanor",
    "Elinor",
    "Eliza",
    "Emma",
    "Fanny",
    "Frank",
    "Frederick",
    "George",
    "Harriet",
    "Henry",
    "Isabella",
    "Jane",
    "John",
    "Julia",
    "Louisa",
    "Lucy",
    "Maria",
    "Mary",
    "Robert",
    "Susan",
    "Thomas",
    "Walter",
)
"""Who is told of."""
WORDS = (
    "apple",
    "basket",
    "bell",
    "bonnet",
    "book",
    "bridge",
    "candle",
    "carriage",
    "castle",
    "chair",
    "church",
    "clock",
    "curtain",
    "door",
    "feather",
    "fire",
    "garden",
    "glass",
    "horse",
    "house",
    "key",
    "lamp",
    "letter",
    "mirror",
    "music",
    "paper",
    "river",
    "ship",
    "silver",
    "table",
    "window",
    "winter",
)
"""What is told of them."""
MOST_PAIRS = 16
"""Names that a document of the corpus tells of, at most."""

# Three tokens a line and a separator: 4, 2 and 1 of the longer ones fill a row of 256 tokens.
_LINES = (10, 21, 42, 85)
_TRAIN, _HELD_OUT = 6_000, 64


class Line(NamedTuple):
    """A name and its word."""

    name: str
    word: str
    is_asked: bool
    """Whether the name was told of before, so that the word can be known."""


def told_and_asked(random: randoms.Random, *, pairs: int, lines: int) -> Iterator[Line]:
    """Lines that tell of so many names, then ask for any of them; in every other document, half of them late.

    Those that are asked for late are not heard of before the last lines, half as many as there are names.
    """
    told = draw_pairs(random, pairs)
    yield from (Line(name, word, False) for name, word in told)
    late = sorted(told, key=lambda _: random.random())[: pairs // 2] if random.random() < 0.5 else []
    early = [pair for pair in told if pair not in late]
    yield from (Line(*one_of(random, early), True) for _ in range(lines - pairs - len(late)))
    yield from (Line(name, word, True) for name, word in late)


def draw_pairs(random: randoms.Random, pairs: int) -> list[tuple[str, str]]:
    """Names in some order, no two alike, each with any word."""
    names = sorted(NAMES, key=lambda _: random.random())[:pairs]
    return [(name, one_of(random, WORDS)) for name in names]


def as_document(title: str, lines: Iterable[Line]) -> Document:
    """The lines as a text; the words that are asked for are scored, with the spaces before them."""
    text, responses = "", []
    for name, word, is_asked in lines:
        text += name
        if is_asked:
            responses.append((len(text), len(text) + 1 + len(word)))
        text += f" {word}\n"
    return Document(title, text, tuple(responses))


def training_documents() -> list[Document]:
    """The same documents on every call: short and long ones, of 2 to 16 names.

    Few names are learned first: where all documents have 16, a small model finds nothing in as many steps.
    """
    random = randoms.Random("pairs, train")
    return [_draw(random, f"train {number}", one_of(random, _LINES)) for number in range(_TRAIN)]


def held_out_documents() -> list[Document]:
    """Documents of 85 lines and 16 names that are not in the training."""
    random = randoms.Random("pairs, held out")
    return [
        as_document(f"held out {number}", told_and_asked(random, pairs=MOST_PAIRS, lines=_LINES[-1]))
        for number in range(_HELD_OUT)
    ]


def one_of[T](random: randoms.Random, things: Sequence[T]) -> T:
    """Any of some things."""
    # Python promises the numbers of `random` alone to stay as they are.
    return things[int(random.random() * len(things))]


def _draw(random: randoms.Random, title: str, lines: int) -> Document:
    pairs = one_of(random, [count for count in (2, 4, 8, MOST_PAIRS) if count <= lines // 2])
    return as_document(title, told_and_asked(random, pairs=pairs, lines=lines))

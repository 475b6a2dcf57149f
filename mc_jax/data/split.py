"""A held-out part that is split off training text: whole documents, or the end of one where there are few.

A document of which responses alone are scored is never cut.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from mc_jax.data.documents import Document

_FEW_DOCUMENTS = 10
_MOST_HELD_OUT = 10_000  # some ten million tokens, which one device evaluates in minutes
# How far back from where the end of a document would begin there may be a space to begin it after.
_LONGEST_WORD = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """A share of the training text that is held out."""

    fraction: float = 0.01
    """Share of the documents, or of all characters where there are few."""
    seed: int = 0
    """Another one draws other documents."""

    def __post_init__(self):
        if not 0 < self.fraction < 1:
            raise ValueError(f"{self.fraction} of the text cannot be held out; give a share between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Which documents are held out, by their places among all of them."""

    whole: np.ndarray
    """Documents that are held out whole, int64, in no order."""
    cut: tuple[int, int] | None = None
    """A document of which the end is held out, and the character where that begins, or a little before."""


def split_off(characters: np.ndarray, share: Share, *, is_whole: bool) -> Split:
    """Draw a share of the documents, at least one; of fewer than ten, take as much of the longest one's end.

    There are at most 10,000, or a large corpus would take hours to be evaluated. The choice depends on their
    number, or their lengths, and the seed alone.

    Args:
      characters: length of each document, int64; one of none is no document.
      share: of the documents, or of all characters.
      is_whole: no document may be cut.

    Raises:
      ValueError: there is too little text.
    """
    places = np.flatnonzero(characters)
    if len(places) >= (2 if is_whole else _FEW_DOCUMENTS):
        number = min(max(1, round(share.fraction * len(places))), _MOST_HELD_OUT)
        drawn = np.random.default_rng(share.seed).choice(len(places), number, replace=False)
        return Split(whole=places[drawn])
    cure = "give files of its own by held_out, or turn it off (--held-out none)"
    if is_whole or characters.max(initial=0) < 2:
        raise ValueError(f"there is too little text to split off a held-out part; {cure}")
    place = int(np.argmax(characters))  # the first of those that are as long
    end = int(characters[place]) - max(1, round(share.fraction * int(characters.sum())))
    if end < 1:
        raise ValueError(
            f"of fewer than {_FEW_DOCUMENTS} documents the end of the longest is held out, and it is "
            f"less than {share.fraction} of the text; {cure}"
        )
    return Split(whole=places[:0], cut=(place, end))


def cut_off(parts: Iterable[Document], end: int) -> Iterator[tuple[bool, Document]]:
    """The parts of a document, and whether each is held out: all behind the last white space before `end`.

    Where there is none near, all from `end` on; the text before is never empty.
    """
    last, start, behind = "", 0, ""
    for part in parts:
        name, text = part.name, last + part.text
        if behind:
            yield True, part._replace(name=behind)
            continue
        if start + len(text) < end + part.continues:
            if last:
                yield False, Document(name, last, continues=True)
            start, last = start + len(last), part.text
            continue
        begin = _after_a_space(text, end - start)
        behind = f"{name} from character {start + begin} on"
        if last and begin > len(last):  # parts are tokenized as they were cut
            yield False, Document(name, last, continues=True)
            yield False, Document(name, text[len(last) : begin])
        else:
            yield False, Document(name, text[:begin])
        yield True, Document(behind, text[begin:], continues=part.continues)


def _after_a_space(text: str, end: int) -> int:
    """The place after the last white space before `end`; `end` where there is none near, never 0."""
    for begin in range(end, max(0, end - _LONGEST_WORD), -1):
        if text[begin - 1].isspace():
            return begin
    return end

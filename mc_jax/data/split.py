"""A held-out part that is split off training text: whole documents, or the end of one where there are few.

A document of which responses alone are scored is never cut.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from mc_jax.data.documents import Document

_FEW_DOCUMENTS = 10
_MOST_HELD_OUT = 10_000  # some ten million tokens, which one device evaluates in minutes
_SEED = 0
# How far back from where the end of a document would begin there may be a space to begin it after.
_LONGEST_WORD = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Which documents are held out, by their places among those that are not empty."""

    whole: frozenset[int] = frozenset()
    """Documents that are held out whole."""
    cut: tuple[int, int] | None = None
    """A document of which the end is held out, and the character where that begins, or a little before."""

    def train(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents, and the beginning of one, that are left to be trained on."""
        return (rest for rest, _ in self._apply(documents) if rest is not None)

    def held_out(self, documents: Iterable[Document]) -> Iterator[Document]:
        """What is held out."""
        return (held_out for _, held_out in self._apply(documents) if held_out is not None)

    def _apply(self, documents: Iterable[Document]) -> Iterator[tuple[Document | None, Document | None]]:
        for place, document in enumerate(document for document in documents if document.text):
            if place in self.whole:
                yield None, document
            elif self.cut is not None and place == self.cut[0]:
                name, text, _ = document
                begin = _after_a_space(text, self.cut[1])
                yield (
                    Document(name, text[:begin]),
                    Document(f"{name} from character {begin} on", text[begin:]),
                )
            else:
                yield document, None


def split_off(documents: Iterable[Document], share: float) -> Split:
    """Draw a share of the documents, at least one; of fewer than ten, take as much of the longest one's end.

    There are at most 10,000, or a large corpus would take hours to be evaluated. The choice depends on their
    number, or their lengths, alone.

    Args:
      documents: all of them; read once, for their lengths.
      share: of the documents, or of all characters.

    Raises:
      ValueError: there is too little text.
    """
    count, characters, longest, is_whole = 0, 0, (0, 0), False
    for count, document in enumerate((document for document in documents if document.text), start=1):
        characters += len(document.text)
        longest = max(longest, (len(document.text), -count))
        is_whole = is_whole or document.responses is not None
    if count >= (2 if is_whole else _FEW_DOCUMENTS):
        number = min(max(1, round(share * count)), _MOST_HELD_OUT)
        drawn = np.random.default_rng(_SEED).choice(count, number, replace=False)
        return Split(whole=frozenset(drawn.tolist()))
    length, place = longest[0], -longest[1] - 1
    if length < 2 or is_whole:
        raise ValueError(
            "there is too little text to split off a held-out part; give files of its own by held_out, "
            "or turn it off (--held-out none)"
        )
    return Split(cut=(place, length - max(1, round(share * characters))))


def _after_a_space(text: str, end: int) -> int:
    """The place after the last white space before `end`; `end` where there is none near, never 0."""
    for begin in range(end, max(0, end - _LONGEST_WORD), -1):
        if text[begin - 1].isspace():
            return begin
    return end

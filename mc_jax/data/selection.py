"""Which documents of which files go where: all are read once to decide it, and again to be tokenized.

So what is bad or there twice is known before anything is written, and a text of any length is never in memory
as a whole: of a document its length and a hash are kept.
"""

import array
import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from mc_jax.data._readers import Problem, Reading, read_documents
from mc_jax.data.dataset import HELD_OUT, TRAIN
from mc_jax.data.documents import Document
from mc_jax.data.sources import Source
from mc_jax.data.split import Share, cut_off, split_off

# Held-out files are read first: their copies in the training text are the later ones.
_PARTS = (HELD_OUT, TRAIN)
_LEFT_OUT = len(_PARTS)
_CHANGED = "files have changed while they were read"

type Progress = Callable[[str, float], None]
"""Is told what is being done, and how much of it is, from 0 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Documents that are in no part, for one reason."""

    count: int
    """Their number."""
    first: str
    """The first of them, for people: a line with file and place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The documents of some files, each with the part that it is for."""

    sources: Mapping[str, Sequence[Source]]
    """The files of each part."""
    reading: Reading
    """How they are read."""
    labels: np.ndarray
    """Part of each document, or problem, in the order in which they are read; uint8 [documents]."""
    cut: tuple[int, int] | None
    """A document of which the end is held out, and the character near which that begins."""
    characters: int
    """Characters of all that are in a part."""
    left_out: Mapping[str, LeftOut]
    """What is in none, by why."""
    duplicates: int
    """Documents that are equal to an earlier one."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that have documents, training first."""
        used = {_PARTS[label] for label in np.unique(self.labels) if label != _LEFT_OUT}
        if self.cut is not None:
            used.add(HELD_OUT)
        return tuple(part for part in (TRAIN, HELD_OUT) if part in used)

    def documents(self, told: Progress | None = None, what: str = "") -> Iterator[tuple[str, Document]]:
        """The documents, and the part of each, in the order in which they are read.

        Args:
          told: is told how much is done.
          what: is done with them.

        Raises:
          ValueError: a file has changed since.
        """
        done, last = 0, -1
        read = _numbered(self.sources, self.reading)
        for number, items in itertools.groupby(read, key=lambda item: item[0]):
            if number >= len(self.labels):
                raise ValueError(f"{_CHANGED}: there is more in them; prepare them again")
            label, last = int(self.labels[number]), number
            if label == _LEFT_OUT:
                continue
            parts = (self._unchanged(item) for _, _, item in items)
            if self.cut is not None and number == self.cut[0]:
                labelled = (
                    (HELD_OUT if is_behind else TRAIN, part)
                    for is_behind, part in cut_off(parts, self.cut[1])
                )
            else:
                labelled = ((_PARTS[label], part) for part in parts)
            for part, document in labelled:
                yield part, document
                done += len(document.text)
                if told is not None:
                    told(what, done / self.characters)
        if last != len(self.labels) - 1:
            raise ValueError(f"{_CHANGED}: there is less in them; prepare them again")

    def training(self) -> Iterator[Document]:
        """The documents that are trained on."""
        return (document for part, document in self.documents() if part == TRAIN)

    @staticmethod
    def _unchanged(item: Document | Problem) -> Document:
        if isinstance(item, Problem):
            raise ValueError(f"{_CHANGED}: {item.message}")
        return item


def select(
    sources: Mapping[str, Sequence[Source]],
    reading: Reading,
    *,
    share: Share | None = None,
    told: Progress | None = None,
) -> Selection:
    """Read all files once, and decide where their documents go.

    Args:
      sources: the files of each part.
      reading: how they are read, and which documents count.
      share: what is held out of the training files; None: nothing but the files for it.
      told: is told how much is done.

    Raises:
      ValueError: a place has no document, unless such are left out; a part has no text, or too little.
    """
    lengths, digests, firsts = array.array("q"), bytearray(), {}
    counts: collections.Counter[str] = collections.Counter()
    total = sum(source.size for files in sources.values() for source in files)
    parts, length, digest = array.array("B"), 0, hashlib.blake2b(digest_size=16)
    before, last, within = 0, None, 0
    for _, (part, source), item in _numbered(sources, reading):
        if isinstance(item, Problem):
            if not reading.skip_bad:
                raise ValueError(item.message)
            counts[item.why] += 1
            firsts.setdefault(item.why, item.message)
            length, digest = 0, hashlib.blake2b(digest_size=16)
        else:
            length += len(item.text)
            digest.update(item.text.encode())
            if source is not last:
                before, last, within = before + (last.size if last is not None else 0), source, 0
            within += len(item.text)
            if told is not None and total:
                told("reading", (before + min(within, source.size)) / total)
            if item.continues:
                continue
            if not length:
                counts["empty"] += 1
                firsts.setdefault("empty", f"{item.name} is empty")
            elif item.responses is not None:
                digest.update(repr(item.responses).encode())
        lengths.append(length)
        digests += digest.digest()
        parts.append(_PARTS.index(part))
        length, digest = 0, hashlib.blake2b(digest_size=16)
    characters = np.array(lengths, np.int64)
    repeats = _repeats(np.frombuffer(digests, np.uint64).reshape(-1, 2)) & (characters > 0)
    if reading.drop_duplicates:
        characters[repeats] = 0
    labels = np.where(characters > 0, np.array(parts, np.uint8), _LEFT_OUT).astype(np.uint8)
    cut = None
    left_out = {why: LeftOut(count=counts[why], first=firsts[why]) for why in counts}
    for part in sources:
        if sources[part] and _PARTS.index(part) not in labels:
            reasons = ", ".join(f"{why}: {count:,}" for why, count in counts.items())
            raise ValueError(
                f"there is no text to write for the part {part}{f' ({reasons})' if reasons else ''}; "
                "give at least one document with text"
            )
    if share is not None:
        split = split_off(characters, share, is_whole=reading.template is not None)
        labels[split.whole] = _PARTS.index(HELD_OUT)
        cut = split.cut
    return Selection(
        sources=sources,
        reading=reading,
        labels=labels,
        cut=cut,
        characters=int(characters.sum()),
        left_out=left_out,
        duplicates=int(np.count_nonzero(repeats)),
    )


def _numbered(
    sources: Mapping[str, Sequence[Source]], reading: Reading
) -> Iterator[tuple[int, tuple[str, Source], Document | Problem]]:
    """What is read, with the number of its document; a problem ends one that has begun, or stands for one."""
    number = 0
    for part in _PARTS:
        for source in sources.get(part, ()):
            for item in read_documents(source, reading):
                yield number, (part, source), item
                number += isinstance(item, Problem) or not item.continues


def _repeats(digests: np.ndarray) -> np.ndarray:
    """Which of some hashes, uint64 [documents, 2], is equal to an earlier one; bool [documents]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: of equal ones the first stays the first
    ordered = digests[order]
    repeats = np.zeros(len(digests), bool)
    repeats[order[1:]] = np.all(ordered[1:] == ordered[:-1], axis=1)
    return repeats

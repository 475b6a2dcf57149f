"""What went into a prepared folder and what did not, for people: summary.json, and lines on the screen."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from mc_jax.data.dataset import TRAIN
from mc_jax.data.documents import TokenizedDocument
from mc_jax.data.selection import Selection

SUMMARY_FILE = "summary.json"
KIND, VERSION = "summary of a prepared folder", 1


@dataclasses.dataclass
class Tally:
    """Counts of a part, which grow with each document."""

    documents: int = 0
    """Their number."""
    tokens: int = 0
    """Tokens of all, without separators."""
    text_bytes: int = 0
    """UTF-8 of what is scored."""
    longest: tuple[int, str] = (0, "")
    """Tokens and name of the longest document, the first of those that are as long."""
    _open: int | None = None

    def add(self, document: TokenizedDocument) -> None:
        """Count a document, or a part of one."""
        length = len(document.tokens) + (self._open or 0)
        self.tokens += len(document.tokens)
        self.text_bytes += document.text_bytes
        self.documents += self._open is None
        self._open = length if document.continues else None
        if not document.continues and length > self.longest[0]:
            self.longest = (length, document.name)

    def totals(self) -> dict[str, int]:
        """What the manifest has of it."""
        return {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.text_bytes}


def summary(selection: Selection, tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """The counts as summary.json has them, the same for the same files."""
    return {
        "kind": KIND,
        "version": VERSION,
        "splits": {
            part: tally.totals()
            | {
                "bytes_per_token": round(tally.text_bytes / max(1, tally.tokens), 4),
                "longest": {"tokens": tally.longest[0], "name": tally.longest[1]},
            }
            for part, tally in tallies.items()
        },
        "left_out": {why: dataclasses.asdict(left) for why, left in selection.left_out.items()},
        "duplicates": {"count": selection.duplicates, "left_out": selection.reading.drop_duplicates},
    }


def told_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """A summary in lines for the screen, without the parts' sizes."""
    for part, counts in values["splits"].items():
        longest, name = counts["longest"], "training" if part == TRAIN else "held-out"
        yield (
            f"{name}: {counts['bytes_per_token']:.2f} bytes per token; "
            f"the longest document is {longest['name']}, {longest['tokens']:,} tokens"
        )
    for why, left in values["left_out"].items():
        yield f"left out, {why}: {left['count']:,}, first: {left['first']}"
    if duplicates := values["duplicates"]["count"]:
        fate = "left out" if values["duplicates"]["left_out"] else "kept; --drop-duplicates leaves them out"
        yield f"equal to an earlier document: {duplicates:,}, {fate}"

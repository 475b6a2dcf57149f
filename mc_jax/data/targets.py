"""What the targets of a document are: how many bytes of its text each one stands for, and how many words."""

import re
from typing import NamedTuple

import numpy as np

from mc_jax.data.store import TokenStore
from mc_jax.data.tokenizer import Tokenizer

_WORD = re.compile(r"\S+")


class TargetCounts(NamedTuple):
    """Bytes and words of a document's text, target by target; their sums are those of the whole text."""

    bytes: np.ndarray
    """UTF-8 bytes of each target, int64 [pairs]; 0 of the separator at the end."""
    words: np.ndarray
    """Words, as `str.split` finds them, that begin in each target, int64 [pairs]."""


def target_counts(store: TokenStore, document: int, tokenizer: Tokenizer) -> TargetCounts:
    """The counts of a document's targets: its tokens, and the separator after the last.

    Args:
      store: the documents.
      document: which.
      tokenizer: what they were tokenized with.
    """
    tokens = store.document(document)
    lengths = tokenizer.byte_lengths[np.append(tokens, store.separator_id)]
    text = tokenizer.decode(tokens)
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    # Where each character begins, in bytes of UTF-8.
    widths = 1 + np.sum(code_points[None] >= np.array([[0x80], [0x800], [0x10000]], np.uint32), axis=0)
    starts = np.cumsum(widths) - widths
    begins = starts[[word.start() for word in _WORD.finditer(text)]] if text else starts
    owners = np.searchsorted(np.cumsum(lengths), begins, side="right")
    return TargetCounts(lengths, np.bincount(owners, minlength=len(lengths)).astype(np.int64))

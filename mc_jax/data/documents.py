"""Documents: the units of text that never see each other, before and after tokenization."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mc_jax.data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 20  # tokenized together, on all cores


class Document(NamedTuple):
    """A text and where it comes from."""

    name: str
    """Its source, for people: a title, or a file and line."""
    text: str
    """The whole text."""


class TokenizedDocument(NamedTuple):
    """A document's tokens."""

    name: str
    """Its source, for people."""
    tokens: np.ndarray
    """int32 [tokens], without separators."""
    text_bytes: int
    """Length of the text in UTF-8, which bits per byte are counted over."""


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    """Tokenize documents in their order, about a megabyte at a time; empty ones are left out."""
    for group in _groups(documents):
        encoded = tokenizer.encode_batch([document.text for document in group])
        for document, tokens in zip(group, encoded, strict=True):
            yield TokenizedDocument(document.name, tokens, len(document.text.encode()))


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    remaining = (document for document in documents if document.text)
    while first := next(remaining, None):
        group, characters = [first], len(first.text)
        while characters < _BATCH_CHARACTERS and (document := next(remaining, None)):
            group.append(document)
            characters += len(document.text)
        yield group

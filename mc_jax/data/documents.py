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
    responses: tuple[tuple[int, int], ...] | None = None
    """Parts of the text that alone are learned and scored, in their order: first character, and the one after
    the last; None: all of it."""
    continues: bool = False
    """Whether its text goes on in the next one: a long document is read, tokenized and stored in parts."""


class TokenizedDocument(NamedTuple):
    """A document's tokens."""

    name: str
    """Its source, for people."""
    tokens: np.ndarray
    """int32 [tokens], without separators."""
    text_bytes: int
    """Length in UTF-8 of what is scored, which bits per byte are counted over."""
    scored: np.ndarray | None = None
    """Which targets are scored: the tokens, and the separator after them, bool [tokens + 1]; None: all."""
    continues: bool = False
    """Whether its tokens go on in the next one; then no separator follows."""


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    """Tokenize documents in their order, about a megabyte at a time; empty ones are left out."""
    for _, tokenized in tokenize_labelled(((None, document) for document in documents), tokenizer):
        yield tokenized


def tokenize_labelled[Label](
    documents: Iterable[tuple[Label, Document]], tokenizer: Tokenizer
) -> Iterator[tuple[Label, TokenizedDocument]]:
    """Tokenize documents of several kinds, in their order; each keeps its label."""
    for group in _groups(documents):
        parts = [_parts(document) for _, document in group]
        encoded = iter(tokenizer.encode_batch([text for some in parts for text, _ in some]))
        for (label, document), some in zip(group, parts, strict=True):
            tokens = [next(encoded) for _ in some]
            text_bytes = sum(len(text.encode()) for text, is_scored in some if is_scored)
            scored = None
            if document.responses is not None:
                ends_so = [some[-1][1]]
                masks = [
                    np.full(len(ids), is_scored) for ids, (_, is_scored) in zip(tokens, some, strict=True)
                ]
                scored = np.concatenate([*masks, ends_so])
            tokens = np.concatenate(tokens)
            yield label, TokenizedDocument(document.name, tokens, text_bytes, scored, document.continues)


def _parts(document: Document) -> list[tuple[str, bool]]:
    """A text in parts, and whether each is scored.

    Parts are tokenized by themselves: a prompt is, when a model answers it, and so no token belongs to both.
    The separator after the last part is scored with it, or a model would not learn to end.
    """
    if document.responses is None:
        return [(document.text, True)]
    parts, end = [], 0
    for start, stop in document.responses:
        parts += [(document.text[end:start], False), (document.text[start:stop], True)]
        end = stop
    parts.append((document.text[end:], False))
    return [part for part in parts if part[0]]


def _groups[Label](documents: Iterable[tuple[Label, Document]]) -> Iterator[list[tuple[Label, Document]]]:
    remaining = (labelled for labelled in documents if labelled[1].text)
    while first := next(remaining, None):
        group, characters = [first], len(first[1].text)
        while characters < _BATCH_CHARACTERS and (labelled := next(remaining, None)):
            group.append(labelled)
            characters += len(labelled[1].text)
        yield group

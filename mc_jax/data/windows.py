"""Windows of documents: what is read, and which of it is scored.

Shapes: B windows of a batch, T tokens.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mc_jax.data.rows import Example, empty_example, put_pairs
from mc_jax.data.store import TokenStore


class Window(NamedTuple):
    """A run of a document's (input, target) pairs, counted from its first."""

    document: int
    start: int
    """The first pair that is read."""
    scored: int
    """The first that is scored."""
    end: int
    """Past the last, which is scored."""


def overlapping_windows(
    store: TokenStore, document: int, *, length: int, stride: int, pairs: int | None = None
) -> Iterator[Window]:
    """Windows in which every pair of a document is scored exactly once.

    The first window scores all that it holds. Each further one goes on by `stride` pairs: it scores these,
    its last, and reads the pairs before them as context. The document's last window goes on by what is left
    and reads the more context.

    Args:
      store: the documents.
      document: which.
      length: pairs in a window, at most.
      stride: pairs by which windows go on.
      pairs: how many of the document's first pairs there are to be; None: all.
    """
    pairs = num_pairs(store, document) if pairs is None else pairs
    scored, end = 0, min(length, pairs)
    while scored < pairs:
        yield Window(document, max(end - length, 0), scored, end)
        scored, end = end, min(end + stride, pairs)


def num_pairs(store: TokenStore, document: int) -> int:
    """(input, target) pairs of a document: one more than tokens."""
    return int(store.offsets[document + 1] - store.offsets[document]) + 1


def example_of(store: TokenStore, window: Window, length: int) -> Example:
    """A window as one row of `length` positions, padding at its end; loss_mask is 1 on what it scores.

    Where responses alone are scored, it is so on those.
    """
    example = empty_example(store, length)
    put_pairs(example, 0, store, window.document, window.start, window.end)
    example["loss_mask"][: window.scored - window.start] = 0
    return example


def batches_of(
    windows: Iterable[Window], store: TokenStore, *, length: int, batch_size: int
) -> Iterator[tuple[tuple[Window, ...], dict[str, np.ndarray]]]:
    """Windows by the batch, with their rows stacked; the last batch is filled with padding alone.

    Yields:
      At most `batch_size` windows, and their inputs, targets, document_ids int32 [B, T], loss_mask float32
      [B, T].
    """
    padding = empty_example(store, length)
    for some in itertools.batched(windows, batch_size):
        rows = [example_of(store, window, length) for window in some]
        filled = [*rows, *[padding] * (batch_size - len(rows))]
        yield some, {name: np.stack([row[name] for row in filled]) for name in padding}


def evaluation_windows(
    store: TokenStore, *, context_length: int, stride: int, batch_size: int, every: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of windows in which loss_mask is 1 on every pair of the store that is scored, exactly once.

    A window holds one document; `overlapping_windows` tells how documents are cut.

    Args:
      store: the documents.
      context_length: T, tokens in a window.
      stride: pairs scored in each but a document's first window; from 1 to context_length.
      batch_size: B; the last batch is filled with windows that are padding alone.
      every: n, where of all windows only the first, the n-th after it, and so on are wanted.

    Returns:
      Of each batch inputs, targets, document_ids: int32 [B, T], and loss_mask: float32 [B, T], 1 on pairs to
      be scored.

    Raises:
      ValueError: `stride` is not in 1..context_length.
    """
    check_stride(stride, context_length)
    windows = (
        window
        for document in range(len(store))
        for window in overlapping_windows(store, document, length=context_length, stride=stride)
    )
    wanted = itertools.islice(windows, 0, None, every)
    batches = batches_of(wanted, store, length=context_length, batch_size=batch_size)
    return (batch for _, batch in batches)


def check_stride(stride: int, context_length: int) -> None:
    """See that windows that go on by `stride` score every pair once.

    Raises:
      ValueError: they do not.
    """
    if not 1 <= stride <= context_length:
        raise ValueError(
            f"stride {stride} leaves pairs that no window scores or scores none; "
            f"set it from 1 to context_length, {context_length}"
        )


def spread_sequences(store: TokenStore, *, length: int, count: int) -> list[np.ndarray]:
    """A few sequences of `length` tokens, each of one document, spread evenly over the text.

    Where there are fewer that long, the longest ends of documents make up the number; a store may have fewer.

    Args:
      store: the documents.
      length: tokens of a sequence; a document's first one begins with the separator.
      count: how many are wanted.

    Returns:
      At most `count` arrays, int32 [at most length], always the same ones.
    """
    pairs = np.diff(store.offsets) + 1
    full = pairs // length
    before = np.cumsum(full) - full
    total = int(full.sum())
    chosen = np.arange(min(count, total)) * total // max(min(count, total), 1)
    documents = np.searchsorted(before + full, chosen, side="right")
    places = list(zip(documents, (chosen - before[documents]) * length, strict=True))
    ends = np.argsort(-(pairs % length), kind="stable")[: count - len(places)]
    places += [(document, full[document] * length) for document in ends if pairs[document] % length]
    return [
        store.sequence(int(document), int(start), int(min(start + length, pairs[document])))
        for document, start in places
    ]

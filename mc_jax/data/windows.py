"""Evaluation windows over whole documents: every pair is scored once, with as much context as fits.

Shapes: B windows of a batch, T tokens.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from mc_jax.data.rows import Example, empty_example, put_pairs
from mc_jax.data.store import TokenStore


def evaluation_windows(
    store: TokenStore, *, context_length: int, stride: int, batch_size: int, every: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of windows in which loss_mask is 1 on every (input, target) pair of the store exactly once.

    A document's first window scores all that it holds. Each further one goes on by `stride` pairs: it
    scores these, its last, and reads context_length - stride pairs before them as context. The document's
    last window goes on by what is left and reads the more context. A window holds one document.

    Args:
      store: the documents.
      context_length: T, tokens in a window.
      stride: pairs scored in each but a document's first window; from 1 to context_length.
      batch_size: B; the last batch is filled with windows that are padding alone.
      every: n, where of all windows only the first, the n-th after it, and so on are wanted.

    Yields:
      inputs, targets, document_ids: int32 [B, T]; loss_mask: float32 [B, T], 1 on pairs to be scored.

    Raises:
      ValueError: `stride` is not in 1..context_length.
    """
    if not 1 <= stride <= context_length:
        raise ValueError(
            f"stride {stride} leaves pairs that no window scores or scores none; "
            f"set it from 1 to context_length, {context_length}"
        )
    wanted = itertools.islice(_windows(store, context_length, stride), 0, None, every)
    return _batches(wanted, empty_example(store, context_length), batch_size)


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


def _batches(wanted: Iterator[Example], padding: Example, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    for windows in itertools.batched(wanted, batch_size):
        filled = [*windows, *[padding] * (batch_size - len(windows))]
        yield {name: np.stack([window[name] for window in filled]) for name in padding}


def _windows(store: TokenStore, context_length: int, stride: int) -> Iterator[Example]:
    for document in range(len(store)):
        pairs = int(store.offsets[document + 1] - store.offsets[document]) + 1
        scored, end = 0, min(context_length, pairs)
        while scored < pairs:
            start = max(end - context_length, 0)
            window = empty_example(store, context_length)
            put_pairs(window, 0, store.sequence(document, start, end + 1))
            window["loss_mask"][: scored - start] = 0
            yield window
            scored, end = end, min(end + stride, pairs)

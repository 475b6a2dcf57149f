"""Training batches: rows in a shuffled order that is a function of the seed alone.

Shapes: B rows of a batch, T tokens, R rows of an epoch.
"""

import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from mc_jax.data.rows import Example, Rows
from mc_jax.data.store import TokenStore

# Rows are built from memory-mapped tokens in well under a millisecond: two threads keep ahead of a device.
_THREADS, _BATCHES_AHEAD = 2, 4


def training_batches(
    store: TokenStore,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    start_row: int = 0,
    align: int = 1,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of rows in an order that depends on the seed alone, not on where the run started.

    Every row comes once an epoch, in an order of its own in each; a batch may span two epochs, so it may be
    larger than the corpus.

    Args:
      store: the documents.
      context_length: T, tokens in a row.
      batch_size: B, rows in a batch.
      seed: of the order, 0 or more.
      start_row: rows that were read already; the first batch begins with the row after them.
      align: documents start at multiples of it in a row (`rows.Rows`).
      rows: which rows of a batch are read, where other processes read the others; None: all.

    Yields:
      inputs, targets, document_ids: int32 [B, T], or as many as `rows`; loss_mask: float32, so too, 0 on
      padding.

    Raises:
      ValueError: `align` does not divide `context_length`.
    """
    rows = range(batch_size) if rows is None else rows
    examples = _ShuffledEpochs(Rows(store, context_length=context_length, align=align), seed)
    batches = grain.MapDataset.source(_PartsOfBatches(examples, start_row, batch_size, rows)).batch(len(rows))
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
    return iter(batches.to_iter_dataset(options))


class _PartsOfBatches:
    """The examples in some places of each batch of a sequence of examples, from one of these on."""

    def __init__(self, examples: "_ShuffledEpochs", start: int, batch_size: int, places: Sequence[int]):
        self._examples, self._start, self._batch_size, self._places = examples, start, batch_size, places

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._places)

    def __getitem__(self, index: int) -> Example:
        batch, place = divmod(index, len(self._places))
        return self._examples[self._start + batch * self._batch_size + int(self._places[place])]


class _ShuffledEpochs:
    """Epoch after epoch of rows as one sequence without end, each in its own order.

    Not Grain's `shuffle`: it walks a space of 65536 indices for each row, which costs milliseconds where an
    epoch has a handful of rows, and seeds epoch e with seed + e, so that runs of neighbouring seeds would
    share their epochs. An order in memory is 8 bytes a row, half of what the index of the rows takes.
    """

    def __init__(self, rows: Rows, seed: int):
        self._rows, self._seed = rows, seed
        # Two, because the threads that read ahead work on both sides of an epoch's end.
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        return 1 << 50  # Grain divides it by the batch size in floating point

    def __getitem__(self, index: int) -> Example:
        epoch, place = divmod(index, len(self._rows))
        return self._rows[int(self._order(epoch)[place])]

    def _draw_order(self, epoch: int) -> np.ndarray:
        # Raw bits of Philox: unlike NumPy's `permutation`, they are promised not to change with its version.
        bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch])).random_raw(len(self._rows))
        return np.argsort(bits, kind="stable")

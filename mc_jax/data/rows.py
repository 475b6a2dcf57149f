"""Documents laid one after another and cut into rows of a fixed length.

Shapes: T context_length, R rows, P documents. A position holds one (input, target) pair or padding.
"""

import numpy as np

from mc_jax.data.store import TokenStore

type Example = dict[str, np.ndarray]
"""inputs, targets, document_ids: int32 [T]; loss_mask: float32 [T], 0 on padding and what is not scored."""


class Rows:
    """A store's pairs in rows: `len` counts rows, `[i]` builds one from the store.

    A document's pairs follow each other; rows are cut at fixed places, so a document may go on in the next
    row; each pair is in exactly one row. Where responses alone are scored, a document is not cut if a row
    can hold it: a response without its prompt would be learned from nothing. `document_ids` counts documents
    from 0 in each row. Padding stands before a document that must be aligned, or whole, and at the end of
    the last row; it has loss_mask 0, separators as input and target, and the id of the document before it.

    Args:
      store: the documents.
      context_length: T, positions in a row.
      align: documents start at multiples of it in a row; 1 is anywhere. Memories that take one gradient
        point a chunk (dla, titans) need their chunk_length here.

    Raises:
      ValueError: `align` does not divide `context_length`.
    """

    def __init__(self, store: TokenStore, *, context_length: int, align: int = 1):
        if align < 1 or context_length % align:
            raise ValueError(
                f"align {align} does not divide context_length {context_length}; "
                f"set context_length to a multiple of {align}"
            )
        self._store, self._length, self._align = store, context_length, align
        pairs = np.diff(store.offsets) + 1
        self._keeps_whole = store.scored is not None
        starts = self._starts(pairs) if self._keeps_whole else _ends(pairs, align)
        row_starts = np.arange(0, starts[-1] + pairs[-1], context_length)
        # All that is kept: each row's first document, and the position at which that document starts.
        self._first_documents = np.searchsorted(starts, row_starts, side="right") - 1
        self._first_starts = starts[self._first_documents]

    def __len__(self) -> int:
        return len(self._first_documents)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row_start = index * self._length
        row_stop = row_start + self._length
        example = empty_example(self._store, self._length)
        first = document = int(self._first_documents[index])
        start = int(self._first_starts[index])
        while document < len(self._store) and start < row_stop:
            pairs = int(self._store.offsets[document + 1] - self._store.offsets[document]) + 1
            begin, end = max(row_start - start, 0), min(row_stop - start, pairs)
            at = start + begin - row_start
            put_pairs(example, at, self._store, document, begin, end)
            example["document_ids"][at:] = document - first
            start += -(-pairs // self._align) * self._align
            document += 1
            if self._keeps_whole and document < len(self._store):
                start = self._place(
                    start, int(self._store.offsets[document + 1] - self._store.offsets[document]) + 1
                )
        return example

    def _starts(self, pairs: np.ndarray) -> np.ndarray:
        """The starts of documents that are kept whole, int64 [P]."""
        starts, end = np.empty(len(pairs), np.int64), 0
        for document, length in enumerate(pairs.tolist()):
            starts[document] = self._place(end, length)
            end = int(starts[document]) + -(-length // self._align) * self._align
        return starts

    def _place(self, end: int, pairs: int) -> int:
        """The start of a document after the one before: in the next row if this one has no room."""
        room = -end % self._length
        return end if pairs <= (room or self._length) else end + room


def _ends(pairs: np.ndarray, align: int) -> np.ndarray:
    """The starts of documents that follow each other wherever rows are cut, int64 [P]."""
    return np.concatenate([[0], np.cumsum(-(-pairs[:-1] // align) * align)])


def empty_example(store: TokenStore, length: int) -> Example:
    """Nothing but padding."""
    return {
        "inputs": np.full(length, store.separator_id, np.int32),
        "targets": np.full(length, store.separator_id, np.int32),
        "document_ids": np.zeros(length, np.int32),
        "loss_mask": np.zeros(length, np.float32),
    }


def put_pairs(example: Example, at: int, store: TokenStore, document: int, start: int, stop: int) -> None:
    """Lay a document's pairs `start` to `stop` from position `at` on; the store tells which are scored."""
    places = slice(at, at + stop - start)
    sequence = store.sequence(document, start, stop + 1)
    example["inputs"][places] = sequence[:-1]
    example["targets"][places] = sequence[1:]
    example["loss_mask"][places] = store.is_scored(document, start, stop)

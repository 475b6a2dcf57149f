"""Packing: an independent model of it (a list of pairs) against rows and windows of every shape."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mc_jax.data.documents import TokenizedDocument
from mc_jax.data.rows import Rows
from mc_jax.data.store import memory_store
from mc_jax.data.tokenizer import ByteTokenizer
from mc_jax.data.windows import evaluation_windows, spread_sequences

SEPARATOR = 256


def store_of(lengths):
    """Documents whose tokens are all different from their neighbours', so that pairs tell their place."""
    counter = iter(range(10**6))
    documents = [
        TokenizedDocument(f"document {n}", np.array([next(counter) % 251 for _ in range(n)], np.int32), n)
        for n in lengths
    ]
    return memory_store(documents, ByteTokenizer())


def pairs_of(store):
    """Per document, its (input, target) pairs."""
    sequences = [[SEPARATOR, *store.document(i).tolist(), SEPARATOR] for i in range(len(store))]
    return [list(itertools.pairwise(sequence)) for sequence in sequences]


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@hypothesis.given(lengths=LENGTHS, context_length=st.integers(1, 30))
def test_rows_hold_every_pair_once_in_order(lengths, context_length):
    store = store_of(lengths)
    rows = list(Rows(store, context_length=context_length))
    scored = [
        (int(row["inputs"][t]), int(row["targets"][t]))
        for row in rows
        for t in range(context_length)
        if row["loss_mask"][t]
    ]
    assert scored == list(itertools.chain(*pairs_of(store)))
    mask = np.concatenate([row["loss_mask"] for row in rows])
    assert (mask == (np.arange(mask.size) < store.num_pairs)).all(), "only the last row's end is padding"


@hypothesis.given(lengths=LENGTHS, align=st.integers(1, 5), chunks=st.integers(1, 6))
def test_aligned_documents_start_at_multiples(lengths, align, chunks):
    store, context_length = store_of(lengths), align * chunks
    rows = Rows(store, context_length=context_length, align=align)
    documents, scored = -1, []
    for index in range(len(rows)):
        row = rows[index]
        for name, dtype in (("inputs", np.int32), ("targets", np.int32), ("document_ids", np.int32)):
            assert row[name].shape == (context_length,)
            assert row[name].dtype == dtype
        assert row["loss_mask"].dtype == np.float32
        ids = row["document_ids"]
        assert ids[0] == 0
        assert row["loss_mask"][0] == 1, "a row never begins with padding"
        starts = np.flatnonzero(np.diff(ids)) + 1
        assert (np.diff(ids)[starts - 1] == 1).all()
        assert (starts % align == 0).all()
        assert (row["inputs"][starts] == SEPARATOR).all(), "documents change at separators"
        assert (row["loss_mask"][starts] == 1).all()
        # An input that is a separator and no padding begins a document.
        begins = (row["inputs"] == SEPARATOR) & (row["loss_mask"] == 1)
        assert set(np.flatnonzero(begins)) - {0} == set(starts)
        padding = row["loss_mask"] == 0
        assert (row["inputs"][padding] == SEPARATOR).all()
        assert (row["targets"][padding] == SEPARATOR).all()
        for t in range(context_length):
            documents += bool(begins[t])
            if not padding[t]:
                scored.append((documents, int(row["inputs"][t]), int(row["targets"][t])))
    expected = [(i, *pair) for i, pairs in enumerate(pairs_of(store)) for pair in pairs]
    assert scored == expected


def test_a_small_example_by_hand():
    rows = Rows(store_of([3, 1, 4]), context_length=8, align=4)
    assert len(rows) == 2
    first, second = rows[0], rows[1]
    s = SEPARATOR
    np.testing.assert_array_equal(first["inputs"], [s, 0, 1, 2, s, 3, s, s])
    np.testing.assert_array_equal(first["targets"], [0, 1, 2, s, 3, s, s, s])
    np.testing.assert_array_equal(first["document_ids"], [0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(first["loss_mask"], [1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(second["inputs"], [s, 4, 5, 6, 7, s, s, s])
    np.testing.assert_array_equal(second["loss_mask"], [1, 1, 1, 1, 1, 0, 0, 0])


def test_alignment_must_divide_the_context():
    with pytest.raises(ValueError, match=r"align 3 does not divide context_length 8; .* multiple of 3"):
        Rows(store_of([3]), context_length=8, align=3)


def test_a_row_out_of_range_is_an_index_error():
    rows = Rows(store_of([3]), context_length=8)
    assert len(list(rows)) == 1
    with pytest.raises(IndexError):
        rows[-1]


@hypothesis.given(
    lengths=LENGTHS, sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)), batch=st.integers(1, 4)
)
def test_windows_score_every_pair_once_with_enough_context(lengths, sizes, batch):
    stride, context_length = sorted(sizes)
    store = store_of(lengths)
    windows = []
    for arrays in evaluation_windows(store, context_length=context_length, stride=stride, batch_size=batch):
        assert {name: (value.shape, value.dtype.name) for name, value in arrays.items()} == {
            "inputs": ((batch, context_length), "int32"),
            "targets": ((batch, context_length), "int32"),
            "document_ids": ((batch, context_length), "int32"),
            "loss_mask": ((batch, context_length), "float32"),
        }
        assert not arrays["document_ids"].any()
        windows += [{name: value[i] for name, value in arrays.items()} for i in range(batch)]
    number = 0
    for pairs in pairs_of(store):
        scored = 0
        while scored < len(pairs):
            window = windows[number]
            number += 1
            places = np.flatnonzero(window["loss_mask"])
            assert (np.diff(places) == 1).all()
            end = scored + len(places)
            start = end - places[-1] - 1
            expected = pairs[start:end]
            content = list(zip(window["inputs"].tolist(), window["targets"].tolist(), strict=True))
            assert content[: len(expected)] == expected, "a window is a stretch of its document"
            assert set(content[len(expected) :]) <= {(SEPARATOR, SEPARATOR)}
            assert scored == 0 or scored - start >= context_length - stride, "too little context"
            assert scored == 0 or len(places) <= stride
            scored = end
        assert scored == len(pairs)
    assert not any(window["loss_mask"].any() for window in windows[number:])
    assert len(windows) - number < batch


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_skips_pairs_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        evaluation_windows(store_of([3]), context_length=8, stride=stride, batch_size=1)


@hypothesis.given(lengths=LENGTHS, length=st.integers(1, 30), count=st.integers(1, 6))
def test_spread_sequences_are_full_ones_evenly_apart_or_else_the_longest_ends(lengths, length, count):
    store = store_of(lengths)
    cut = [
        list(itertools.batched([SEPARATOR, *store.document(i).tolist()], length)) for i in range(len(store))
    ]
    full = [one for document in cut for one in document if len(one) == length]
    ends = [document[-1] for document in cut if len(document[-1]) < length]
    found = [tuple(row.tolist()) for row in spread_sequences(store, length=length, count=count)]
    if len(full) >= count:
        assert found == [full[place * len(full) // count] for place in range(count)]
    else:
        longest = sorted(ends, key=len, reverse=True)
        assert found == full + longest[: count - len(full)]

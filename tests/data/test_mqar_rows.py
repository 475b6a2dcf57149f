"""Multi-query associative recall: what is asked was told before, once."""

import numpy as np
import pytest

from mc_jax.data.mqar import IGNORED, mqar_batch

SMALL = {"rows": 16, "length": 64, "pairs": (4, 8, 16), "vocab_size": 128}


@pytest.mark.parametrize("random_fillers", [False, True])
def test_every_key_is_asked_for_once_and_its_value_was_told_before(random_fillers):
    batch = mqar_batch(0, 3, **SMALL, random_fillers=random_fillers)
    assert batch.tokens.dtype == batch.labels.dtype == np.int32
    counts = set()
    for tokens, labels in zip(*batch, strict=True):
        asked = np.flatnonzero(labels != IGNORED)
        count = len(asked)
        counts.add(count)
        told = dict(zip(tokens[0 : 2 * count : 2], tokens[1 : 2 * count : 2], strict=True))
        assert len(told) == count
        assert all(0 < key < 64 <= value < 128 for key, value in told.items())
        assert asked.min() >= 2 * count
        assert {tokens[place]: labels[place] for place in asked} == told
        fillers = np.delete(tokens[2 * count :], asked - 2 * count)
        assert random_fillers == bool(fillers.any())
    assert counts == {4, 8, 16}, "16 rows drew only some of the numbers of pairs"


def test_most_keys_come_again_soon_and_some_late():
    labels = mqar_batch(0, 0, rows=2000, length=128, pairs=4, vocab_size=64).labels
    slots = (np.nonzero(labels != IGNORED)[1] - 8) // 2
    near, far = np.mean(slots < 10), np.mean(slots >= 30)
    # Weights of about 1 / gap over 60 slots: 2.9 of 4.7 lie in the first ten for a single draw.
    assert 0.5 < near < 0.75
    assert 0.08 < far < 0.25


def test_rows_are_a_function_of_seed_and_step():
    first, again = mqar_batch(1, 2, **SMALL), mqar_batch(1, 2, **SMALL)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    for seed, step in ((1, 3), (2, 2)):
        assert (mqar_batch(seed, step, **SMALL).tokens != first.tokens).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 62}, "make it even, 64 or more"),
        ({"length": 65}, "make it even, 64 or more"),
        ({"vocab_size": 33}, "set it to 34 or more"),
        ({"pairs": (4, 0)}, "set both to 1 or more"),
        ({"rows": 0}, "set both to 1 or more"),
    ],
)
def test_what_has_no_room_is_refused_with_the_cure(changes, message):
    with pytest.raises(ValueError, match=message):
        mqar_batch(0, 0, **{**SMALL, **changes})

"""Multi-query associative recall (MQAR), the synthetic task of Zoology (arXiv:2312.04927).

A row lists n pairs of a key and its value, k1 v1 ... kn vn; then every key comes once more, and the model is
to say its value. Keys come again after gaps of a power law: most of them soon, some late.

Shapes: B rows, T tokens, n pairs.
"""

from typing import NamedTuple

import numpy as np

IGNORED = -1
"""The label where nothing is asked."""

_POWER = 0.01


class MqarBatch(NamedTuple):
    """Rows of the task."""

    tokens: np.ndarray
    """[B, T], int32."""
    labels: np.ndarray
    """The value that is asked for at the places of queries, `IGNORED` elsewhere [B, T], int32."""


def mqar_batch(
    seed: int,
    step: int,
    *,
    rows: int,
    length: int,
    pairs: int | tuple[int, ...],
    vocab_size: int,
    random_fillers: bool = False,
) -> MqarBatch:
    """Rows of MQAR, a function of the seed and the step.

    Args:
      seed: 0 or more; of training, or of evaluation, which must not be the same.
      step: 0 or more.
      rows: B.
      length: T, even.
      pairs: n; of several, each row draws its own.
      vocab_size: keys are of its lower half (but 0), values of its upper.
      random_fillers: tokens between the queries are drawn from the vocabulary, and may then look like keys;
        otherwise they are 0.

    Raises:
      ValueError: a length or a vocabulary in which the pairs have no room.
    """
    choices = (pairs,) if isinstance(pairs, int) else tuple(pairs)
    _check(rows, length, choices, vocab_size)
    random = np.random.default_rng((seed, step))
    most = max(choices)
    count = random.choice(np.array(choices), size=(rows, 1))
    used = np.arange(most)[None] < count
    half = vocab_size // 2
    keys = _distinct(random, rows, half - 1, most) + 1
    values = _distinct(random, rows, vocab_size - half, most) + half

    tokens = np.zeros((rows, length), np.int32)
    labels = np.full((rows, length), IGNORED, np.int32)
    if random_fillers:
        tokens[:] = random.integers(vocab_size, size=(rows, length))
    row = np.broadcast_to(np.arange(rows)[:, None], used.shape)
    place = np.broadcast_to(2 * np.arange(most)[None], used.shape)
    query = 2 * count + 2 * _slots(random, length // 2 - count, most)
    for at, what in ((place, keys), (place + 1, values), (query, keys)):
        tokens[row[used], at[used]] = what[used]
    labels[row[used], query[used]] = values[used]
    return MqarBatch(tokens, labels)


def _distinct(random: np.random.Generator, rows: int, size: int, most: int) -> np.ndarray:
    """Numbers below `size` in random order, no two alike in a row [B, most]."""
    return np.argsort(random.random((rows, size)), axis=1)[:, :most]


def _slots(random: np.random.Generator, slots: np.ndarray, most: int) -> np.ndarray:
    """Places below `slots` [B, 1] for the queries [B, most], drawn without replacement.

    Slot g has a weight of g^(power - 1). The largest of log weight + Gumbel noise are such a draw.
    """
    gap = np.arange(1, slots.max() + 1)
    score = (_POWER - 1) * np.log(gap) + random.gumbel(size=(len(slots), len(gap)))
    score[gap[None] > slots] = -np.inf
    return np.argsort(-score, axis=1)[:, :most]


def _check(rows: int, length: int, choices: tuple[int, ...], vocab_size: int) -> None:
    if rows < 1 or not choices or min(choices) < 1:
        raise ValueError(f"rows is {rows} and pairs {choices}; set both to 1 or more")
    most = max(choices)
    if length % 2 or length < 4 * most:
        raise ValueError(f"length {length} has no room for {most} pairs; make it even, {4 * most} or more")
    if vocab_size // 2 <= most:
        raise ValueError(
            f"vocab_size {vocab_size} has too few keys for {most} pairs; set it to {2 * most + 2} or more"
        )

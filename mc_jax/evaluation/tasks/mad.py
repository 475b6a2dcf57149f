"""Four tasks of the MAD suite (arXiv:2403.17844), at its baseline's settings but for the length.

In-context recall, noisy recall, fuzzy recall and selective copying (athms/mad-lab at 0f49a45:
mad/data/instances.py, configs/tasks). Symbol n is token n of the run's vocabulary. Not here, as docs/tasks.md
says why: compression and memorization, which are asked of weights that were trained on them.
"""

import functools

import numpy as np

from mc_jax.evaluation.tasks.mqar import symbol_tokens
from mc_jax.evaluation.tasks.sample import Ask, RowSample, RowTask, TooShort

_SYMBOLS = 16  # of keys and values together, and of copying with its two signs
_NOISE_SYMBOLS = 16  # these come after keys and values
_COPIED = 16
_MOTIF = 3  # symbols of a fuzzy key, and of its value at most


def draw_recall(name: str, noise_share: float, ask: Ask) -> RowSample:
    """Pairs of keys and values, which come again; each key that was told before is asked for its value.

    Args:
      name: of the task, which seeds it.
      noise_share: probability of two tokens of noise in place of a pair.
      ask: what is asked for.

    Raises:
      TooShort: two pairs have no room.
    """
    random = ask.random(name)
    pairs = ask.length // 2
    if pairs < 2:
        raise TooShort(ask.length, 4)
    half = _SYMBOLS // 2
    values = random.integers(half, _SYMBOLS, half)
    tokens = np.stack([random.integers(half, size=pairs), np.zeros(pairs, np.int64)], axis=1)
    tokens[:, 1] = values[tokens[:, 0]]
    is_noise = random.random(pairs) < noise_share
    is_noise[random.integers(pairs - 1)] = False  # one pair is told, at least
    is_noise[-1] = False
    told = tokens[:-1, 0][~is_noise[:-1]]
    tokens[-1, 0] = random.choice(told)
    tokens[-1, 1] = values[tokens[-1, 0]]
    tokens[is_noise] = random.integers(_SYMBOLS, _SYMBOLS + _NOISE_SYMBOLS, (int(is_noise.sum()), 2))
    first = np.zeros(pairs, bool)
    first[np.unique(np.where(is_noise, _SYMBOLS, tokens[:, 0]), return_index=True)[1]] = True
    asked = ~first & ~is_noise
    return RowSample(
        tokens=symbol_tokens(ask.tokenizer, tokens.reshape(-1)[:-1]),
        places=np.flatnonzero(asked).astype(np.int32) * 2,
        targets=symbol_tokens(ask.tokenizer, tokens[asked, 1]),
        candidates=symbol_tokens(ask.tokenizer, np.arange(half, _SYMBOLS)),
        sources={"tokens": "the first symbols of the run's vocabulary"},
        labels={"noise": noise_share},
    )


def draw_fuzzy_recall(ask: Ask) -> RowSample:
    """Keys of three symbols, values of one to three; each key that was told before is asked for its value.

    Blanks fill the row up at its start. All keys are of the full size, as in MAD's tests: its training has
    shorter ones, too. One thing differs: the last pair was always told before, where MAD may draw it a place
    behind the end of the others.

    Raises:
      TooShort: one pair has no room beside the one that is asked for.
    """
    if ask.length < 4 * _MOTIF:
        raise TooShort(ask.length, 4 * _MOTIF)
    random = ask.random("mad-fuzzy-recall")
    blank = _SYMBOLS - 1
    half = blank // 2

    def motif(symbols: np.ndarray, size: int) -> tuple[int, ...]:
        return tuple(int(symbol) for symbol in random.choice(symbols, size, replace=False))

    def value() -> tuple[int, ...]:
        return motif(np.arange(half, blank), int(random.integers(1, _MOTIF + 1)))

    last = motif(np.arange(half), _MOTIF)
    values = {last: value()}
    room = ask.length - _MOTIF - len(values[last])
    # Where the last pair is told, or at most so soon after that there is still room for it.
    place = int(random.integers(max(1, room - 4 * _MOTIF + 2)))
    tokens: list[int] = []
    asked: list[bool] = []
    told: set[tuple[int, ...]] = set()

    def tell(key: tuple[int, ...]) -> None:
        tokens.extend((*key, *values[key]))
        asked.extend([False] * _MOTIF + [key in told] * len(values[key]))
        told.add(key)

    while len(tokens) + 2 * _MOTIF <= room:
        if len(tokens) >= place and last not in told:
            tell(last)
            continue
        key = motif(np.arange(half), _MOTIF)
        if key not in values:
            values[key] = value()
        tell(key)
    tell(last)
    row = np.array([blank] * (ask.length - len(tokens)) + tokens)
    is_asked = np.array([False] * (ask.length - len(tokens)) + asked)
    return RowSample(
        tokens=symbol_tokens(ask.tokenizer, row[:-1]),
        places=(np.flatnonzero(is_asked) - 1).astype(np.int32),
        targets=symbol_tokens(ask.tokenizer, row[is_asked]),
        candidates=symbol_tokens(ask.tokenizer, np.arange(half, blank)),
        sources={"tokens": "the first symbols of the run's vocabulary"},
    )


def draw_selective_copying(ask: Ask) -> RowSample:
    """Symbols among blanks, the sign to copy, and as many blanks, at which the symbols are asked for.

    Raises:
      TooShort: the symbols have no room.
    """
    blanks = ask.length - 2 * _COPIED - 1
    if blanks < 1:
        raise TooShort(ask.length, 2 * _COPIED + 2)
    random = ask.random("mad-selective-copying")
    blank, copy = _SYMBOLS - 2, _SYMBOLS - 1
    copied = random.integers(blank, size=_COPIED)
    told = np.insert(copied, random.integers(_COPIED, size=blanks), blank)
    tokens = np.concatenate([told, [copy], np.full(_COPIED, blank)])
    return RowSample(
        tokens=symbol_tokens(ask.tokenizer, tokens),
        places=np.arange(ask.length - _COPIED, ask.length, dtype=np.int32),
        targets=symbol_tokens(ask.tokenizer, copied),
        candidates=symbol_tokens(ask.tokenizer, np.arange(blank)),
        sources={"tokens": "the first symbols of the run's vocabulary"},
    )


def _recall(name: str, noise_share: float, summary: str) -> RowTask:
    return RowTask(name=name, summary=summary, draw=functools.partial(draw_recall, name, noise_share))


MAD = (
    _recall("mad-recall", 0.0, "MAD: values of keys that came before"),
    _recall("mad-noisy-recall", 0.2, "MAD: the same among noise"),
    RowTask(
        name="mad-fuzzy-recall", summary="MAD: values of keys, of several symbols", draw=draw_fuzzy_recall
    ),
    RowTask(name="mad-selective-copying", summary="MAD: symbols among blanks", draw=draw_selective_copying),
)

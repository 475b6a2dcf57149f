"""Words of names that were told at the beginning and are asked for at the end, other names in between.

The lines are those of the corpus "pairs" (`mc_jax.data.pairs`): sixteen names are told of, eight of them are
asked for until the sample is nearly as long as it may be, then each of the other eight once. So the tokens
since a name was heard of are about the sample's length.
"""

import random as randoms

import numpy as np

from mc_jax.data.documents import tokenize
from mc_jax.data.pairs import MOST_PAIRS, WORDS, Line, as_document, draw_pairs, one_of
from mc_jax.evaluation.tasks.sample import Ask, RowSample, RowTask, TooShort, answer_tokens

_ASKED = MOST_PAIRS // 2


def draw(ask: Ask) -> RowSample:
    """A row whose last eight lines are asked for.

    Raises:
      ValueError: the length has no room for sixteen names, and eight of them once more.
    """
    random = randoms.Random(f"word-pairs {ask.seed} {ask.index}")
    told = draw_pairs(random, MOST_PAIRS)
    asked = sorted(told, key=lambda _: random.random())[:_ASKED]
    others = [pair for pair in told if pair not in asked]
    first = [Line(name, word, False) for name, word in told]
    last = [Line(name, word, True) for name, word in asked]

    def row(between: list[Line]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, the separator before them included, and which of their targets are scored."""
        (document,) = tokenize([as_document("", [*first, *between, *last])], ask.tokenizer)
        assert document.scored is not None
        return np.concatenate([[ask.tokenizer.separator_id], document.tokens]), document.scored

    between: list[Line] = []
    tokens, scored = row(between)
    if len(tokens) > ask.length:
        raise TooShort(ask.length, len(tokens))
    sizes = {name: len(row([Line(name, word, False)])[0]) - len(tokens) for name, word in others}
    room = ask.length - len(tokens)
    while True:
        name, word = one_of(random, others)
        if sizes[name] > room:
            break
        room -= sizes[name]
        between.append(Line(name, word, False))
    tokens, scored = row(between)
    places = np.flatnonzero(scored[: len(tokens) - 1]).astype(np.int32)
    candidates = np.unique(np.concatenate([answer_tokens(ask.tokenizer, word) for word in WORDS]))
    return RowSample(
        tokens=tokens.astype(np.int32),
        places=places,
        targets=tokens[places + 1].astype(np.int32),
        candidates=candidates.astype(np.int32),
        sources={"tokens": f"{len(WORDS)} words"},
        labels={"pairs": MOST_PAIRS},
    )


WORD_PAIRS = RowTask(
    name="word-pairs", summary="words of names that were told of a whole sample ago", draw=draw
)

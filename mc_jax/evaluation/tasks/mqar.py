"""Multi-query associative recall (Zoology, arXiv:2312.04927) in the tokens of a run's own vocabulary."""

import numpy as np

from mc_jax.data.mqar import IGNORED, mqar_batch
from mc_jax.data.tokenizer import Tokenizer
from mc_jax.evaluation.tasks.sample import Ask, RowSample, RowTask

TOKENS_A_PAIR = 16
"""Zoology's rows of Figure 2: 4 pairs in 64 tokens, 8 in 128, 16 in 256."""
_MOST_SYMBOLS = 8192  # Zoology's vocabulary


def draw(ask: Ask) -> RowSample:
    """A row of keys with values, and every key once more; fillers are symbol 0.

    Raises:
      ValueError: the length or the vocabulary has no room for the pairs.
    """
    length = ask.length // 2 * 2
    symbols = min(_MOST_SYMBOLS, ask.tokenizer.vocab_size - 1)
    pairs = max(1, length // TOKENS_A_PAIR)
    if length < 4 or symbols // 2 <= pairs:
        raise ValueError(
            f"a length of {ask.length} tokens asks for {pairs} pairs of {symbols} symbols; "
            f"set --recall.length between 4 and {TOKENS_A_PAIR * (symbols // 2 - 1)}"
        )
    seed = int(ask.random("mqar").integers(1 << 62))
    batch = mqar_batch(seed, ask.index, rows=1, length=length, pairs=pairs, vocab_size=symbols)
    places = np.flatnonzero(batch.labels[0] != IGNORED).astype(np.int32)
    targets = symbol_tokens(ask.tokenizer, batch.labels[0, places])
    return RowSample(
        tokens=symbol_tokens(ask.tokenizer, batch.tokens[0]),
        places=places,
        targets=targets,
        candidates=np.sort(targets),
        sources={"tokens": f"{symbols} symbols of the run's vocabulary"},
        labels={"pairs": pairs},
    )


def symbol_tokens(tokenizer: Tokenizer, symbols: np.ndarray) -> np.ndarray:
    """The token of each symbol, int32: all ids in their order but the separator's, which is no symbol."""
    return (symbols + (symbols >= tokenizer.separator_id)).astype(np.int32)


MQAR = RowTask(name="mqar", summary="the values of keys in pairs, one for every 16 tokens", draw=draw)

"""The chunk recurrence for GPUs: the same products by XLA, with many segments side by side.

On a GPU a loop over segments and their chunks is a row of small kernels that leave most of it idle. But
linear, swla and delta take a state to an affine function of it: what every chunk does to the state is
computed for all at once, and put together by one product (linear, swla) or an associative scan (delta). A
loop remains, over pieces of a row of _CHUNKS chunks, which bounds the memory.

No GPU has run this: which form is faster is reckoned, not measured. There is none of it for titans, whose
functions of the state have matrices of 2 K x 2 K: to put those together would be some sixteen times the
multiplications of its loop.

B batch, T tokens, S segments, H heads, K key dim, V value dim.
"""

import functools

import jax

from pallas_kernels._chunks import Tokens
from pallas_kernels._state import OnlineState
from pallas_kernels.chunk_memory import _delta, _linear
from pallas_kernels.chunk_memory.xla import run

_RUNS = {
    "linear": functools.partial(_linear.linear_chunks, carry=_linear.carry_at_once),
    "swla": functools.partial(_linear.linear_chunks, carry=_linear.carry_at_once),
    "delta": functools.partial(_delta.delta_chunks, carry=_delta.carry_at_once),
}
# Chunks of a piece: the share of each in putting them together grows with their number, and so does memory.
_CHUNKS = 64
# Rows times heads that keep a GPU of some 100 multiprocessors busy one chunk after another. From there on
# delta's loop wins, with a quarter of the multiplications.
_BUSY = 128


def has_form(rule: str) -> bool:
    """Whether there is a form for GPUs of a rule."""
    return rule in _RUNS


def is_best(q: jax.Array, rule: str) -> bool:
    """Whether this form is reckoned to be faster on a GPU than `xla`, for queries [B, T, H, K]."""
    return has_form(rule) and (rule != "delta" or q.shape[0] * q.shape[2] < _BUSY)


def chunk_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rule: str,
    retention: jax.Array | None,
    momentum: jax.Array | None,
    step: jax.Array | None,
    previous_step: jax.Array | None,
    segment_length: int,
    segment_init: str,
    initial_state: jax.Array | None,
    chunk_length: int,
    document_ids: jax.Array | None,
    lengths: jax.Array | None,
) -> tuple[jax.Array, jax.Array, OnlineState]:
    """See `pallas_kernels.chunk_memory`, which checks the arguments."""
    if not has_form(rule):
        raise ValueError(
            f"rule {rule!r} has no form of its own for GPUs; leave implementation out, or choose 'xla'"
        )
    independent = segment_init == "independent"
    chunks = -(-segment_length // chunk_length)

    def segments(state: OnlineState, tokens: Tokens, initial: jax.Array):
        state, reads, ends = _RUNS[rule](state, tokens, initial)
        # A row's only segment may have fewer chunks.
        return state, reads, ends[:, min(chunks, ends.shape[1]) - 1 :: chunks]

    return run(
        q,
        k,
        v,
        rule=rule,
        coefficients=(retention, momentum, step, previous_step),
        segment=segments,
        side_by_side=max(1, _CHUNKS // chunks),
        segment_length=segment_length,
        independent=independent,
        initial_state=initial_state,
        chunk_length=chunk_length,
        document_ids=document_ids,
        lengths=lengths,
    )

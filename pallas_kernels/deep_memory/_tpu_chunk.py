"""One chunk of the MLP memory of one head, on values: what the TPU's kernels compute, forward and backward.

The same dual form as `_chunk`. Shapes: C tokens of a chunk, K key dim (and value dim), E hidden dim. Weights
are W_in [K, E] and W_out transposed [K, E]; coefficients are rows [1, C].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._branch import Branch
from pallas_kernels._query import gelu
from pallas_kernels.deep_memory._chunk import gelu_and_slope
from pallas_kernels.deep_memory._tpu_products import attend, collect, gather, spread, there_and_back

type State = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]
"""The rows of either layer: (weights, momentum), or just (weights,)."""


class Shares(NamedTuple):
    """How much of the chunk's start (weights, then momentum) and of each write is in a state."""

    read: tuple[jax.Array, ...]
    """[C, 1]: of the start's weights, and momentum, in each token's weights."""
    between: jax.Array
    """[C, C]: of the write of token j in the weights of token i."""
    written: tuple[jax.Array, ...]
    """[C, 1]: of each write in the end's weights, and momentum."""
    kept: tuple[jax.Array, ...]
    """[1, 1]: of the start's weights, and momentum, in the end's weights; of its momentum in the end's."""


class Writes(NamedTuple):
    """Minus the gradients of a chunk: of W_in k^T hidden_signal, of W_out^T signal^T key_gelu."""

    signal: jax.Array
    """[C, K]."""
    key_gelu: jax.Array
    """[C, E]."""
    hidden_signal: jax.Array
    """[C, E]."""


def chunk(
    state: State,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    coefficients: tuple[jax.Array, ...],
    branch: Branch,
) -> tuple[State, jax.Array]:
    """Return the state after a chunk and its reads [C, K].

    Args:
      state: the state before, in float32.
      q: queries [C, K]; products are of their dtype.
      k: keys [C, K].
      v: values [C, K].
      coefficients: step and retention, and with a momentum that and 1 where a token is written.
      branch: of z.
    """
    dtype = q.dtype
    in_rows, out_rows = state
    step, *decays = coefficients
    shares = decay_shares(*decays)
    key_hidden, query_hidden = _first_layer(in_rows, q, k, shares.read)
    writes = write(state, k, v, step, branch, key_hidden)
    hidden = gelu(query_hidden + attend(q, k, shares.between, writes.hidden_signal, dtype))
    output = gather(hidden, shares.read, out_rows, dtype) + attend(
        hidden, writes.key_gelu, shares.between, writes.signal, dtype
    )
    return advance(state, k, writes, shares), branch.of(output)


def _first_layer(
    rows: tuple[jax.Array, ...], q: jax.Array, k: jax.Array, shares: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """Return k W_in at the chunk's start, and of q what is left of that in each token's weights: [C, E]."""
    if len(rows) > 1:
        return spread(k, (), rows[:1], q.dtype), spread(q, shares, rows, q.dtype)
    # Both have the same weights: they pass through the matrix unit one after the other.
    both = spread(jnp.concatenate([k, q], axis=0), (), rows, q.dtype)
    count = k.shape[0]
    return both[:count], shares[0] * both[count:]


def write(
    state: State,
    k: jax.Array,
    v: jax.Array,
    step: jax.Array,
    branch: Branch,
    key_hidden: jax.Array | None = None,
) -> Writes:
    """Return what a chunk's tokens write, their gradients taken at the state before it.

    `key_hidden` is k W_in; None: not yet made.
    """
    (w_in, *momentum), (w_out, *_) = state
    wide, dtype = w_in.dtype, k.dtype
    if key_hidden is None:
        key_hidden = spread(k, (), (w_in,), dtype)
    key_gelu, slope = gelu_and_slope(key_hidden)
    v, step = v.astype(wide), _column(step)
    if momentum:
        v = v - k.astype(wide)
    elif not branch.is_bounded:
        signal = step * v
        return Writes(signal, key_gelu, spread(signal, (), (w_out,), dtype) * slope)
    signal_of = functools.partial(_signal, branch, bool(momentum))
    signal, hidden_signal = there_and_back(key_gelu, w_out, v, step, signal_of, dtype)
    return Writes(signal, key_gelu, hidden_signal * slope)


def _signal(branch: Branch, is_error: bool, output: jax.Array, v: jax.Array, step: jax.Array) -> jax.Array:
    """Return minus the gradient of z, times the step: of z's branch the value, or what it lacks of it."""
    return step * branch.bar(output, v - branch.of(output) if is_error else v)


def advance(state: State, k: jax.Array, writes: Writes, shares: Shares) -> State:
    """Return the state after a chunk."""
    in_rows, out_rows = state
    move = functools.partial(_advance, shares=shares)
    dtype = k.dtype
    return (
        move(in_rows, collect(k, shares.written, writes.hidden_signal, dtype)),
        move(out_rows, collect(writes.signal, shares.written, writes.key_gelu, dtype)),
    )


def _advance(rows, written, shares):
    weights = shares.kept[0] * rows[0] + written[0]
    if len(rows) == 1:
        return (weights,)
    _, moved, carried = shares.kept
    return weights + moved * rows[1], carried * rows[1] + written[1]


def decay_shares(
    retention: jax.Array, momentum: jax.Array | None = None, live: jax.Array | None = None
) -> Shares:
    """Return the shares that retention and momentum leave; see `_chunk.decay_shares`."""
    kept = _decays(retention)
    since = _first_column(kept) * _first(retention)
    if momentum is None or live is None:
        return Shares((since,), kept, (_last_row(kept),), (_last(since),))
    pushed = _decays(momentum)
    # Where nothing is written the momentum stays, and does not move the weights.
    between = jnp.matmul(
        kept * live, pushed, precision=jax.lax.Precision.HIGHEST, preferred_element_type=kept.dtype
    )
    moved_since = _first_column(between) * _first(momentum)
    pushed_since = _first_column(pushed) * _first(momentum)
    return Shares(
        (since, moved_since),
        between,
        (_last_row(between), _last_row(pushed)),
        (_last(since), _last(moved_since), _last(pushed_since)),
    )


def _decays(factor: jax.Array) -> jax.Array:
    """Return D [C, C] with D_ij = factor_{j+1} ... factor_i for i >= j and 0 above: of factor [1, C].

    A cumulative product down the columns by doubling: as in `_decay.decay_matrix` nothing is divided.
    """
    count = factor.shape[1]
    row, column = _indices(count, 0), _indices(count, 1)
    decays = jnp.where(row > column, _column(factor), 1.0)
    size = 1
    while size < count:
        decays = decays * _shift(decays, size)
        size *= 2
    return jnp.where(row >= column, decays, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _shift(x: jax.Array, count: int) -> jax.Array:
    """Move rows down by `count`, and fill up with ones."""
    return jnp.where(_indices(x.shape[0], 0) >= count, pltpu.roll(x, count, 0), 1.0)


def _shift_forward(x, count):
    return _shift(x, count), None


def _shift_backward(count, _, out_bar):
    size = out_bar.shape[0]
    return (jnp.where(_indices(size, 0) < size - count, pltpu.roll(out_bar, size - count, 0), 0.0),)


_shift.defvjp(_shift_forward, _shift_backward)


def _indices(count: int, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (count, count), axis)


# Cells are picked with masks and sums, whose gradients are masks too, where those of slices are copies.


def _column(row: jax.Array) -> jax.Array:
    """Turn [1, C] into [C, 1]."""
    count = row.shape[1]
    diagonal = jnp.where(_indices(count, 0) == _indices(count, 1), jnp.broadcast_to(row, (count, count)), 0.0)
    return jnp.sum(diagonal, axis=1, keepdims=True)


def _first_column(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(_indices(x.shape[0], 1) == 0, x, 0.0), axis=1, keepdims=True)


def _last_row(x: jax.Array) -> jax.Array:
    """Return the last row of [C, C] as a column."""
    count = x.shape[0]
    row = jnp.sum(jnp.where(_indices(count, 0) == count - 1, x, 0.0), axis=0, keepdims=True)
    return _column(row)


def _first(row: jax.Array) -> jax.Array:
    """Return the first of [1, C]: [1, 1]."""
    index = jax.lax.broadcasted_iota(jnp.int32, row.shape, 1)
    return jnp.sum(jnp.where(index == 0, row, 0.0), axis=1, keepdims=True)


def _last(column: jax.Array) -> jax.Array:
    """Return the last of [C, 1]: [1, 1]."""
    index = jax.lax.broadcasted_iota(jnp.int32, column.shape, 0)
    return jnp.sum(jnp.where(index == column.shape[0] - 1, column, 0.0), axis=0, keepdims=True)

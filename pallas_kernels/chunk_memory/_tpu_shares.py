"""How much of a block's start, and of each write of its tokens, is in a memory: on values in a TPU's kernel.

Retentions, momenta and what follows from them lie along lanes, a token a lane. No logarithm is taken and
nothing is divided, so that a coefficient may be tiny or 0, as where a document starts.

Shapes: C tokens of a block, H heads of a group.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chunk_memory._tpu_products import MATMUL, MATMUL_TRANSPOSED, dot


class Coefficients(NamedTuple):
    """Coefficients of all heads [H, C], or of one [1, C]."""

    step: jax.Array
    """0 where nothing is written."""
    retention: jax.Array
    """1 where nothing is written, 0 where a document starts."""
    momentum: jax.Array | None
    """1 where nothing is written, 0 where a document starts; None for delta."""
    restart: jax.Array | None
    """How much of the initial memory enters with a token; None if that is never."""


class Marks(NamedTuple):
    """What titans needs to know about tokens [1, C], the same for all heads."""

    live: jax.Array
    """1 where a token is written and 0 where not."""
    fresh: jax.Array
    """1 where the token's chunk begins a document, and else 0."""


class Shares(NamedTuple):
    """Shares, of all heads [H, ...] or of one [1, ...].

    Carried are the memory, the momentum (titans), the initial memory (where documents restart from one).
    """

    read: tuple[jax.Array, ...]
    """[H, C]: of what is carried in the memory at a token."""
    error: tuple[jax.Array, ...]
    """[H, C]: of what is carried in the memory whose error a token writes."""
    write: tuple[jax.Array, ...]
    """[H, C]: of a token's write in the end's memory, and momentum."""
    kept: tuple[jax.Array, ...]
    """[H, 1]: of what is carried in the end's memory, and of the momentum in the end's momentum."""


class _Run(NamedTuple):
    """What a run of tokens does: memory <- kept memory + moved momentum + entered, momentum <- pushed it."""

    kept: jax.Array
    momentum: tuple[jax.Array, jax.Array] | None
    """Moved and pushed: titans."""
    entered: jax.Array | None
    """None if the initial memory never enters."""

    def then(self, later: "_Run") -> "_Run":
        """Return what this run and a later one do together."""
        momentum, entered = self.momentum, self.entered
        if momentum is not None and later.momentum is not None:
            (moved, pushed), (later_moved, later_pushed) = momentum, later.momentum
            momentum = (later.kept * moved + later_moved * pushed, later_pushed * pushed)
        if entered is not None and later.entered is not None:
            entered = later.kept * entered + later.entered
        return _Run(later.kept * self.kept, momentum, entered)

    def shifted(self, count: int) -> "_Run":
        """Move runs to later lanes, filling up with runs of no token."""
        momentum, entered = self.momentum, self.entered
        if momentum is not None:
            momentum = (shift(momentum[0], count, 0.0), shift(momentum[1], count, 1.0))
        if entered is not None:
            entered = shift(entered, count, 0.0)
        return _Run(shift(self.kept, count, 1.0), momentum, entered)


def block_shares(numbers: Coefficients, marks: Marks | None, chunk: int) -> Shares:
    """Return all but the shares between tokens.

    Args:
      numbers: of all heads.
      marks: of titans, or None.
      chunk: tokens of a chunk, at whose start titans takes its errors.
    """
    momentum = None
    if marks is not None and numbers.momentum is not None:
        momentum = (marks.live * numbers.momentum, numbers.momentum)
    since = _Run(numbers.retention, momentum, numbers.restart)
    until = since._replace(entered=None)
    length = numbers.retention.shape[1]
    size = 1
    while size < length:
        since = since.shifted(size).then(since)
        until = until.then(until.shifted(-size))
        size *= 2
    until = until.shifted(-1)
    entered = () if since.entered is None else (since.entered,)
    if marks is None or since.momentum is None or until.momentum is None:
        read = (since.kept, *entered)
        return Shares(read, read, (until.kept,), tuple(map(_last, read)))
    moved, pushed = since.momentum
    read = (since.kept, moved, *entered)
    select = chunk_start(length, chunk)
    first = jax.lax.broadcasted_iota(jnp.int32, marks.fresh.shape, 1) < chunk

    def at_start(x, before, restarted):
        """Before a block's first chunk, and where a document starts, are no lanes to look at."""
        x = jnp.where(first, before, dot(x, select, MATMUL, jnp.dtype(jnp.float32)))
        return (1.0 - marks.fresh) * x + restarted * marks.fresh

    at = ((1.0, 0.0), (0.0, 0.0), (0.0, 1.0))
    error = tuple(at_start(x, *else_) for x, else_ in zip(read, at, strict=False))
    write = (marks.live * until.kept + until.momentum[0], until.momentum[1])
    return Shares(read, error, write, tuple(map(_last, (*read, pushed))))


def chunk_start(length: int, chunk: int) -> jax.Array:
    """Return what picks for a token the lane before its chunk, if any: [C, C] of 0 and 1."""
    row, column = _indices(length)
    return jnp.where(row == (column & -chunk) - 1, 1.0, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def shift(x: jax.Array, count: int, fill: float) -> jax.Array:
    """Move x [H, C] by `count` lanes, to earlier ones if it is negative, and fill up."""
    length = x.shape[1]
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    kept = lane >= count if count > 0 else lane < length + count
    return jnp.where(kept, pltpu.roll(x, count % length, 1), fill)


def _shift_forward(x, count, fill):
    return shift(x, count, fill), None


def _shift_backward(count, fill, _, bar):
    return (shift(bar, -count, 0.0),)


shift.defvjp(_shift_forward, _shift_backward)


def _last(x: jax.Array) -> jax.Array:
    """Return the last lane; its gradient is a mask, where a slice's would be a copy."""
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.sum(jnp.where(lane == x.shape[1] - 1, x, 0.0), axis=1, keepdims=True)


def _indices(length: int) -> tuple[jax.Array, jax.Array]:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
    return row, column


def next_columns(x_HC: jax.Array) -> jax.Array:
    """Return as columns [C, H] what the next token has, as `kept_between` and `moved_between` ask for."""
    return shift(x_HC, -1, 1.0).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def kept_between(retention: jax.Array, next_retention: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return D [C, C]: of the write of token j in the memory at token t, D_jt = a_{j+1} ... a_t.

    Args:
      retention: [1, C]; it gets the gradient.
      next_retention: the same as a column [C, 1], and moved by one.
      dtype: of the operands of products, backward.
    """
    del retention, dtype
    return _running_products(next_retention)


def _kept_forward(retention, next_retention, dtype):
    between = _running_products(next_retention)
    return between, between


def _kept_backward(dtype, between, bar):
    return _sum_of_changes(dot(bar, between, MATMUL_TRANSPOSED, dtype), between), None


kept_between.defvjp(_kept_forward, _kept_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def moved_between(
    retention: jax.Array,
    momentum: jax.Array,
    next_retention: jax.Array,
    next_momentum: jax.Array,
    live: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
    """Return G [C, C]: as `kept_between`, where a write enters by the momentum, G_jt = a_t G_jt-1 + E_jt.

    E_jt = m_{j+1} ... m_t is its share of the momentum; where nothing is written, that moves nothing.
    """
    return _moved_forward(retention, momentum, next_retention, next_momentum, live, dtype)[0]


def _moved_forward(retention, momentum, next_retention, next_momentum, live, dtype):
    del retention, momentum
    kept, pushed = _running_products(next_retention), _running_products(next_momentum)
    moved = dot(pushed * live, kept, MATMUL, dtype)
    return moved, (moved, kept, pushed, live)


def _moved_backward(dtype, residuals, bar):
    moved, kept, pushed, live = residuals
    # The gradients of G and of E with all that follows from them.
    moved_bar = dot(bar, kept, MATMUL_TRANSPOSED, dtype)
    pushed_bar = dot(moved_bar * live, pushed, MATMUL_TRANSPOSED, dtype)
    return _sum_of_changes(moved_bar, moved), _sum_of_changes(pushed_bar, pushed), None, None, None


moved_between.defvjp(_moved_forward, _moved_backward)


def _sum_of_changes(bar, between):
    """Return sum_j bar_jt between_j,t-1, the gradient of the factor of token t [1, C]."""
    row, column = _indices(between.shape[0])
    before = jnp.where(row < column, pltpu.roll(between, 1, 1), 0.0)
    return jnp.sum(bar * before, axis=0, keepdims=True)


def _running_products(next_factor: jax.Array) -> jax.Array:
    """Return D [C, C] with D_jt = x_{j+1} ... x_t, 0 for t < j, of factors moved by one and as a column."""
    length = next_factor.shape[0]
    row, column = _indices(length)
    products = jnp.where(row < column, jnp.broadcast_to(next_factor, (length, length)), 1.0)
    size = 1
    while size < length:
        products = products * jnp.where(row < length - size, pltpu.roll(products, length - size, 0), 1.0)
        size *= 2
    return jnp.where(row <= column, products, 0.0)

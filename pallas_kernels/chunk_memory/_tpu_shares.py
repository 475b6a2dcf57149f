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
    """Of all heads [H, C], or of one [1, C]."""

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
    pushed: jax.Array | None
    moved: jax.Array | None
    entered: jax.Array | None

    def then(self, later: "_Run") -> "_Run":
        """Return what this run and a later one do together."""
        pushed = moved = entered = None
        if self.pushed is not None:
            pushed = later.pushed * self.pushed
            moved = later.kept * self.moved + later.moved * self.pushed
        if self.entered is not None:
            entered = later.kept * self.entered + later.entered
        return _Run(later.kept * self.kept, pushed, moved, entered)

    def shifted(self, count: int) -> "_Run":
        """Move runs to later lanes, filling up with runs of no token."""
        nothing = (1.0, 1.0, 0.0, 0.0)
        return _Run(
            *(None if x is None else shift(x, count, fill) for x, fill in zip(self, nothing, strict=True))
        )


def block_shares(numbers: Coefficients, marks: Marks | None, chunk: int) -> Shares:
    """Return all but the shares between tokens.

    Args:
      numbers: of all heads.
      marks: of titans, or None.
      chunk: tokens of a chunk, at whose start titans takes its errors.
    """
    token = _Run(
        numbers.retention,
        numbers.momentum,
        None if marks is None else marks.live * numbers.momentum,
        numbers.restart,
    )
    length = numbers.retention.shape[1]
    since, until = token, token._replace(entered=None)
    size = 1
    while size < length:
        since = since.shifted(size).then(since)
        until = until.then(until.shifted(-size))
        size *= 2
    until = until.shifted(-1)
    read = _present(since.kept, since.moved, since.entered)
    if marks is None:
        return Shares(read, read, (until.kept,), tuple(_last(x) for x in read))
    select = chunk_start(length, chunk)
    first = jax.lax.broadcasted_iota(jnp.int32, marks.fresh.shape, 1) < chunk
    goes_on = 1.0 - marks.fresh

    def at_start(x, before, restarted):
        x = dot(x, select, MATMUL, jnp.float32)
        return goes_on * jnp.where(first, before, x) + restarted * marks.fresh

    error = tuple(at_start(x, *at) for x, at in zip(read, ((1.0, 0.0), (0.0, 0.0), (0.0, 1.0)), strict=False))
    write = (marks.live * until.kept + until.moved, until.pushed)
    return Shares(read, error, write, (*(_last(x) for x in read), _last(since.pushed)))


def chunk_start(length: int, chunk: int) -> jax.Array:
    """Return what picks for a token the lane before its chunk, or 0: [C, C] of 0 and 1; chunk a power of 2."""
    row, column = _indices(length)
    return jnp.where(row == (column & -chunk) - 1, 1.0, 0.0)


def _present(*rows):
    return tuple(row for row in rows if row is not None)


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

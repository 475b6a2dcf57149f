"""Products of a chunk's tokens with weights on a TPU, gradients written out.

All but one are sides of one form, sum_r <diag(scale_r) X rows_r, Y>: weights lie with their narrow dim first,
so that what is scaled, or transposed for a product, is always narrow. Operands are rounded to the dtype of
`like`, a float32 one is not rounded further, and sums are in float32.

Shapes: C tokens of a chunk, K the narrow dim of weights, E the wide one. X [C, K], Y [C, E], scales [C, 1]
(no scales: there is one row, and its scale is 1), rows of weights [K, E].
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

_MATMUL = ((1,), (0,))
_MATMUL_TRANSPOSED = ((1,), (1,))
_TRANSPOSED_MATMUL = ((0,), (0,))


def dot(left: jax.Array, right: jax.Array, sides: tuple, dtype: jnp.dtype) -> jax.Array:
    """Return a product of matrices rounded to `dtype`, contracting the given sides."""
    return jax.lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (sides, ((), ())),
        precision=None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _scaled(x: jax.Array, scales: Sequence[jax.Array]) -> jax.Array:
    """Return [scale_1 X, scale_2 X, ...] [C, R K]."""
    x = x.astype(jnp.float32)
    return jnp.concatenate([scale * x for scale in scales], axis=1) if scales else x


def _unscaled(x_CRK: jax.Array, x: jax.Array, scales: Sequence[jax.Array]) -> tuple[jax.Array, tuple]:
    """Undo `_scaled` for gradients: return those of X and of the scales."""
    if not scales:
        return x_CRK.astype(x.dtype), ()
    dim, wide = x.shape[1], x.astype(jnp.float32)
    parts = [x_CRK[:, row * dim : (row + 1) * dim] for row in range(len(scales))]
    terms = [scale * part for scale, part in zip(scales, parts, strict=True)]
    scales_bar = tuple(jnp.sum(part * wide, axis=1, keepdims=True) for part in parts)
    return sum(terms[1:], terms[0]).astype(x.dtype), scales_bar


def _rows(stacked: jax.Array, count: int) -> tuple[jax.Array, ...]:
    dim = stacked.shape[0] // count
    return tuple(stacked[row * dim : (row + 1) * dim] for row in range(count))


def _stack(rows: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    return jnp.concatenate([row.astype(dtype) for row in rows], axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(x: jax.Array, scales: Sequence[jax.Array], rows: Sequence[jax.Array], dtype) -> jax.Array:
    """sum_r diag(scale_r) X rows_r: [C, E]."""
    return dot(_scaled(x, scales), _stack(rows, dtype), _MATMUL, dtype)


def _spread_forward(x, scales, rows, dtype):
    return spread(x, scales, rows, dtype), (x, scales, rows)


def _spread_backward(dtype, residuals, y_bar):
    x, scales, rows = residuals
    x_CRK = dot(y_bar, _stack(rows, dtype), _MATMUL_TRANSPOSED, dtype)
    rows_bar = _rows(dot(_scaled(x, scales), y_bar, _TRANSPOSED_MATMUL, dtype), len(rows))
    return *_unscaled(x_CRK, x, scales), rows_bar


spread.defvjp(_spread_forward, _spread_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gather(y: jax.Array, scales: Sequence[jax.Array], rows: Sequence[jax.Array], dtype) -> jax.Array:
    """sum_r diag(scale_r) Y rows_r^T: [C, K]."""
    return _gather_forward(y, scales, rows, dtype)[0]


def _gather_forward(y, scales, rows, dtype):
    x_CRK = dot(y, _stack(rows, dtype), _MATMUL_TRANSPOSED, dtype)
    if not scales:
        return x_CRK, (y, scales, rows, None)
    dim = rows[0].shape[0]
    terms = [scale * x_CRK[:, row * dim : (row + 1) * dim] for row, scale in enumerate(scales)]
    return sum(terms[1:], terms[0]), (y, scales, rows, x_CRK)


def _gather_backward(dtype, residuals, x_bar):
    y, scales, rows, x_CRK = residuals
    scaled = _scaled(x_bar, scales)
    y_bar = dot(scaled, _stack(rows, dtype), _MATMUL, dtype)
    rows_bar = _rows(dot(scaled, y, _TRANSPOSED_MATMUL, dtype), len(rows))
    scales_bar = _unscaled(x_CRK, x_bar, scales)[1] if scales else ()
    return y_bar.astype(y.dtype), scales_bar, rows_bar


gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def there_and_back(
    y: jax.Array, row: jax.Array, target: jax.Array, scale: jax.Array, signal_of: Callable, dtype
) -> tuple[jax.Array, jax.Array]:
    """X = signal_of(Y row^T, target, scale) [C, K], and X row [C, E].

    The signal is made of each row by itself. Two gradients of the row are one product of all their tokens.
    """
    return _there_and_back_forward(y, row, target, scale, signal_of, dtype)[0]


def _there_and_back_forward(y, row, target, scale, signal_of, dtype):
    output = dot(y, row, _MATMUL_TRANSPOSED, dtype)
    x = signal_of(output, target, scale)
    return (x, dot(x, row, _MATMUL, dtype)), (y, row, target, scale, output)


def _there_and_back_backward(signal_of, dtype, residuals, bars):
    y, row, target, scale, output = residuals
    x_bar, back_bar = bars
    x, vjp = jax.vjp(signal_of, output, target, scale)
    output_bar, target_bar, scale_bar = vjp(x_bar + dot(back_bar, row, _MATMUL_TRANSPOSED, dtype))
    left, right = _stack((x, output_bar), dtype), _stack((back_bar, y), dtype)
    row_bar = dot(left, right, _TRANSPOSED_MATMUL, dtype)
    return dot(output_bar, row, _MATMUL, dtype), row_bar, target_bar, scale_bar


there_and_back.defvjp(_there_and_back_forward, _there_and_back_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def collect(x: jax.Array, scales: Sequence[jax.Array], y: jax.Array, dtype) -> tuple[jax.Array, ...]:
    """(diag(scale_r) X)^T Y for every r: rows [K, E]."""
    return _rows(dot(_scaled(x, scales), y, _TRANSPOSED_MATMUL, dtype), len(scales))


def _collect_forward(x, scales, y, dtype):
    return collect(x, scales, y, dtype), (x, scales, y)


def _collect_backward(dtype, residuals, rows_bar):
    x, scales, y = residuals
    stacked = _stack(rows_bar, dtype)
    x_bar, scales_bar = _unscaled(dot(y, stacked, _MATMUL_TRANSPOSED, dtype), x, scales)
    y_bar = dot(_scaled(x, scales), stacked, _MATMUL, dtype)
    return x_bar, scales_bar, y_bar.astype(y.dtype)


collect.defvjp(_collect_forward, _collect_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(left: jax.Array, right: jax.Array, shares: jax.Array, values: jax.Array, dtype) -> jax.Array:
    """(left right^T * shares) values, of left and right [C, M], shares [C, C], values [C, N]: [C, N]."""
    return _attend_forward(left, right, shares, values, dtype)[0]


def _attend_forward(left, right, shares, values, dtype):
    scores = dot(left, right, _MATMUL_TRANSPOSED, dtype)
    return dot(scores * shares, values, _MATMUL, dtype), (left, right, shares, values, scores)


def _attend_backward(dtype, residuals, out_bar):
    left, right, shares, values, scores = residuals
    shared_bar = dot(out_bar, values, _MATMUL_TRANSPOSED, dtype)
    scores_bar = shared_bar * shares
    left_bar = dot(scores_bar, right, _MATMUL, dtype)
    right_bar = dot(scores_bar, left, _TRANSPOSED_MATMUL, dtype)
    values_bar = dot(scores * shares, out_bar, _TRANSPOSED_MATMUL, dtype)
    return (
        left_bar.astype(left.dtype),
        right_bar.astype(right.dtype),
        shared_bar * scores,
        values_bar.astype(values.dtype),
    )


attend.defvjp(_attend_forward, _attend_backward)

"""Products of token rows and weights, with gradients in the forms that are fastest to compute.

The transposes that JAX would derive leave weight-sized gradients transposed, copy them back, and multiply
rows by coefficients where columns are fewer. Here every product is written out, both ways. Tokens' rows X are
in their own dtype and weights are rounded to it; products accumulate in float32 (float64 if X is).

Shapes: C tokens of a chunk, K and E the inner dims of a layer (E may be its output), any leading axes.
"""

import jax
import jax.numpy as jnp

from pallas_kernels._state import state_dtype


def _precision(dtype: jnp.dtype) -> str | None:
    """Return what keeps a product from being rounded to bfloat16, as accelerators do with float32."""
    return None if dtype == jnp.bfloat16 else "highest"


def _matmul(left: jax.Array, right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return left right, both rounded to `dtype` and not further."""
    left, right = left.astype(dtype), right.astype(dtype)
    return jnp.matmul(left, right, precision=_precision(dtype), preferred_element_type=state_dtype(left))


def _matmul_transposed(left: jax.Array, right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return left right^T, both rounded to `dtype` and not further."""
    left, right = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(
        "...ck,...ek->...ce",
        left,
        right,
        precision=_precision(dtype),
        preferred_element_type=state_dtype(left),
    )


def _transposed_matmul(left: jax.Array, right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return left^T right: the transpose is a copy, cheaper than a product that strides through its rows."""
    return _matmul(left.swapaxes(-1, -2), right, dtype)


def _scaled_outer(x: jax.Array, scale: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return sum_c scale_c x_c^T y_c, the scale put on the narrower of x [C, K] and y [C, E]."""
    if y.shape[-1] <= x.shape[-1]:
        return _transposed_matmul(x, scale[..., None] * y, dtype)
    return _matmul(x.swapaxes(-1, -2) * scale[..., None, :], y, dtype)


@jax.custom_vjp
def apply(x: jax.Array, weights: jax.Array) -> jax.Array:
    """X W: [C, K] and [K, E] to [C, E]."""
    return _matmul(x, weights, x.dtype)


def _apply_forward(x, weights):
    return apply(x, weights), (x, weights)


def _apply_backward(residuals, out_bar):
    x, weights = residuals
    x_bar = _matmul_transposed(out_bar, weights, x.dtype)
    weights_bar = _transposed_matmul(x, out_bar, x.dtype)
    return x_bar.astype(x.dtype), weights_bar.astype(weights.dtype)


apply.defvjp(_apply_forward, _apply_backward)


@jax.custom_vjp
def apply_transposed(x: jax.Array, weights: jax.Array) -> jax.Array:
    """X W^T: [C, K] and [E, K] to [C, E]."""
    return _matmul_transposed(x, weights, x.dtype)


def _apply_transposed_forward(x, weights):
    return apply_transposed(x, weights), (x, weights)


def _apply_transposed_backward(residuals, out_bar):
    x, weights = residuals
    x_bar = _matmul(out_bar, weights, x.dtype)
    weights_bar = _transposed_matmul(out_bar, x, x.dtype)
    return x_bar.astype(x.dtype), weights_bar.astype(weights.dtype)


apply_transposed.defvjp(_apply_transposed_forward, _apply_transposed_backward)


@jax.custom_vjp
def decayed_apply(x: jax.Array, shares: tuple[jax.Array, ...], rows: tuple[jax.Array, ...]) -> jax.Array:
    """sum_r diag(shares_r) X rows_r: rows of weights [K, E], each with its share [C] in every token."""
    terms = [share[..., None] * _matmul(x, row, x.dtype) for share, row in zip(shares, rows, strict=True)]
    return sum(terms[1:], terms[0])


def _decayed_apply_forward(x, shares, rows):
    return decayed_apply(x, shares, rows), (x, shares, rows)


def _decayed_apply_backward(residuals, out_bar):
    x, shares, rows = residuals
    wide = x.astype(out_bar.dtype)
    x_bar, shares_bar, rows_bar = jnp.zeros_like(wide), [], []
    for share, row in zip(shares, rows, strict=True):
        unscaled_bar = _matmul_transposed(out_bar, row, x.dtype)
        x_bar += share[..., None] * unscaled_bar
        shares_bar.append(jnp.sum(wide * unscaled_bar, axis=-1))
        rows_bar.append(_scaled_outer(wide, share, out_bar, x.dtype))
    return x_bar.astype(x.dtype), tuple(shares_bar), tuple(rows_bar)


decayed_apply.defvjp(_decayed_apply_forward, _decayed_apply_backward)


@jax.custom_vjp
def decayed_outer(x: jax.Array, y: jax.Array, shares: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """sum_c shares_r,c x_c^T y_c for every r: from X [C, K] and Y [C, E], all in the state's dtype."""
    return tuple(_scaled_outer(x, share, y, x.dtype) for share in shares)


def _decayed_outer_forward(x, y, shares):
    return decayed_outer(x, y, shares), (x, y, shares)


def _decayed_outer_backward(residuals, out_bars):
    x, y, shares = residuals
    x_bar, y_bar, shares_bar = jnp.zeros_like(x), jnp.zeros_like(y), []
    for share, out_bar in zip(shares, out_bars, strict=True):
        share = share[..., None]
        if y.shape[-1] <= x.shape[-1]:
            unscaled_bar = _matmul(x, out_bar, x.dtype)
            y_bar += share * unscaled_bar
            shares_bar.append(jnp.sum(y * unscaled_bar, axis=-1))
            x_bar += _matmul_transposed(share * y, out_bar, x.dtype)
        else:
            unscaled_bar = _matmul_transposed(y, out_bar, x.dtype)
            x_bar += share * unscaled_bar
            shares_bar.append(jnp.sum(x * unscaled_bar, axis=-1))
            y_bar += _matmul(share * x, out_bar, x.dtype)
    return x_bar, y_bar, tuple(shares_bar)


decayed_outer.defvjp(_decayed_outer_forward, _decayed_outer_backward)

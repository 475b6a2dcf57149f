"""Matrix products of a block of tokens on a TPU, with gradients that are such products too.

Operands are rounded to a dtype, a float32 one is not rounded further, and sums are in float32.

Shapes: C tokens of a block, V value dim.
"""

import functools

import jax
import jax.numpy as jnp

# The sides that are contracted.
MATMUL = (1, 0)
TRANSPOSED_MATMUL = (0, 0)
MATMUL_TRANSPOSED = (1, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(left: jax.Array, right: jax.Array, sides: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Return a product of two float32 matrices rounded to `dtype`."""
    return jax.lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((sides[0],), (sides[1],)), ((), ())),
        precision=None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _dot_forward(left, right, sides, dtype):
    return dot(left, right, sides, dtype), (left, right)


def _dot_backward(sides, dtype, residuals, bar):
    left, right = residuals
    own, other = sides
    left_bar = dot(bar, right, (1, 1 - other), dtype) if own else dot(right, bar, (1 - other, 1), dtype)
    right_bar = dot(bar, left, (0, 1 - own), dtype) if other else dot(left, bar, (1 - own, 0), dtype)
    return left_bar, right_bar


dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def solve(sides_VC: jax.Array, system_CC: jax.Array, first: int, dtype: jnp.dtype) -> jax.Array:
    """Return x with x (I + system) = sides [V, C].

    Args:
      sides_VC: [V, C].
      system_CC: [C, C], 0 but above the diagonal, and 0 in diagonal blocks of size `first`.
      first: a power of two.
      dtype: of the operands of products.
    """
    return _solve_forward(sides_VC, system_CC, first, dtype)[0]


def _solve_forward(sides, system, first, dtype):
    change = _inverse_change(system, first, dtype)
    solved = sides if change is None else sides + dot(sides, change, MATMUL, dtype)
    return solved, (solved, change)


def _solve_backward(first, dtype, residuals, solved_bar):
    solved, change = residuals
    if change is None:
        return solved_bar, jnp.zeros((solved.shape[1],) * 2, solved.dtype)
    sides_bar = solved_bar + dot(solved_bar, change, MATMUL_TRANSPOSED, dtype)
    return sides_bar, -dot(solved, sides_bar, TRANSPOSED_MATMUL, dtype)


solve.defvjp(_solve_forward, _solve_backward)


def _inverse_change(system, first, dtype):
    """Return (I + system)^-1 - I, out of inverses of diagonal blocks of doubling size; None if it is 0.

    That is as accurate as substitution also where keys are nearly parallel: powers of the system overflow.
    """
    count = system.shape[0]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, system.shape, axis) for axis in (0, 1))
    apart = row ^ column
    change, size = None, first
    while size < count:
        across = jnp.where((apart >= size) & (apart < 2 * size), system, 0.0)
        if change is None:
            change = -across
        else:
            across = across + dot(across, change, MATMUL, dtype)
            change = change - across - dot(change, across, MATMUL, dtype)
        size *= 2
    return change

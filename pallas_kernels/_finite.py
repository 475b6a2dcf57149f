"""Data that is not finite, before products whose other factor may be exactly 0: 0 times NaN is NaN.

What is bad is found in one pass, taken for zeros in the products, and made NaN in what depends on it. Where
all is finite, as nearly always, nothing is copied.

B batch, T tokens, H heads, N states, k states a token reads.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._expected import SELDOM
from pallas_kernels._state import Weights


def not_finite(*arrays: jax.Array | None, axes: int) -> jax.Array:
    """Whether there is a number that is not finite in arrays [..., *dims], along all but the first `axes`.

    None stands for no array; one at least must be there.
    """
    bad = [~jnp.all(jnp.isfinite(x), axis=tuple(range(axes, x.ndim))) for x in arrays if x is not None]
    return functools.reduce(jnp.logical_or, bad)


@jax.custom_vjp
def zeroed[Tree](tree: Tree, bad: jax.Array) -> Tree:
    """Leaves [*dims, ...] with zeros where `bad` [*dims] is true.

    The gradient goes through as it is: it is 0 there if a select, `spoilt`, makes NaN afterwards of all that
    depends on what is bad.
    """
    return _replaced(tree, bad, 0)


zeroed.defvjp(lambda tree, bad: (_replaced(tree, bad, 0), None), lambda _, bar: (bar, None))


@jax.custom_vjp
def marked[Tree](tree: Tree, bad: jax.Array) -> Tree:
    """Leaves [*dims, ...] with NaN where `bad` [*dims] is true; the gradient goes through as it is."""
    return _replaced(tree, bad, jnp.nan)


marked.defvjp(lambda tree, bad: (_replaced(tree, bad, jnp.nan), None), lambda _, bar: (bar, None))


def spoilt(x: jax.Array, bad: jax.Array) -> jax.Array:
    """Make x [*dims, ...] NaN where `bad` [*dims] is true; no gradient goes through there."""
    return jnp.where(_like(bad, x), jnp.nan, x)


def states_not_finite(states: Weights) -> jax.Array:
    """Which states [B, N, H, ...] have numbers that are not finite [B, N, H]."""
    return not_finite(*jax.tree.leaves(states), axes=3)


def reads_bad(gates: jax.Array, bad: jax.Array) -> jax.Array:
    """Tokens that weigh a bad state by other than 0: [B, T, H] of gates [B, T, H or 1, N], bad [B, N, H]."""

    def touched(gates: jax.Array, bad: jax.Array) -> jax.Array:
        with jax.named_scope(SELDOM):
            return jnp.any(gates.astype(bool) & bad.swapaxes(1, 2)[:, None], axis=-1)

    return jax.lax.cond(jnp.any(bad), touched, _none, gates, bad)


def selects_bad(gates: jax.Array, indices: jax.Array, bad: jax.Array) -> jax.Array:
    """The same where each token has gates on the few states that indices [B, T, H, k] name."""

    def touched(gates: jax.Array, bad: jax.Array) -> jax.Array:
        with jax.named_scope(SELDOM):
            chosen = jnp.take_along_axis(bad.swapaxes(1, 2)[:, None], indices, axis=-1)
            return jnp.any(gates.astype(bool) & chosen, axis=-1)

    return jax.lax.cond(jnp.any(bad), touched, _none, gates, bad)


def _none(gates: jax.Array, bad: jax.Array) -> jax.Array:
    return jnp.zeros((*gates.shape[:2], bad.shape[2]), bool)


def _replaced[Tree](tree: Tree, bad: jax.Array, value: float) -> Tree:
    def replace(tree: Tree, bad: jax.Array) -> Tree:
        with jax.named_scope(SELDOM):
            return jax.tree.map(lambda x: jnp.where(_like(bad, x), jnp.asarray(value, x.dtype), x), tree)

    return jax.lax.cond(jnp.any(bad), replace, lambda tree, bad: tree, tree, bad)


def _like(bad: jax.Array, x: jax.Array) -> jax.Array:
    return bad.reshape(*bad.shape, *[1] * (x.ndim - bad.ndim))

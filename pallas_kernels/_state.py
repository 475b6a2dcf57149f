"""The state of a memory between two tokens, shared by the memory ops.

B batch, H heads, K key dim, V value dim, E hidden dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

type Weights = jax.Array | tuple[jax.Array, jax.Array]
"""A matrix [..., H, K, V], or an MLP's (w_in [..., H, K, E], w_out [..., H, E, V])."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnlineState:
    """All that a recurrence needs to go on with the next token; what its rule does not use is None."""

    weights: Weights
    """The memory M_t: [B, H, ...]."""
    momentum: Weights | None = None
    """S_t, shaped like the weights: the rules of Titans."""
    anchor: Weights | None = None
    """The weights at the start of the current chunk, where gradients are taken: Titans, MLP memories."""
    previous: tuple[jax.Array, jax.Array] | None = None
    """Key [B, H, K] and value [B, H, V] of the token before: swla."""


def initial_online_state(
    weights: Weights, *, momentum: bool = False, anchor: bool = False, previous: bool = False
) -> OnlineState:
    """Return the state before the first token: no momentum, no token before, a chunk about to start.

    Args:
      weights: initial weights [B, H, ...] in the state's dtype, as from `batch_weights`.
      momentum: the rule keeps a momentum.
      anchor: the rule takes gradients at the start of a chunk.
      previous: the rule writes the token before as well; `weights` is then a matrix.
    """
    before = None
    if previous:
        assert not isinstance(weights, tuple)
        before = (jnp.zeros_like(weights[..., 0]), jnp.zeros_like(weights[..., 0, :]))
    return OnlineState(
        weights=weights,
        momentum=jax.tree.map(jnp.zeros_like, weights) if momentum else None,
        anchor=weights if anchor else None,
        previous=before,
    )


def go_on(start: OnlineState, like: OnlineState) -> OnlineState:
    """Return the state `start`, from before a chunk, with the parts and the dtype of the state `like`."""
    start = OnlineState(
        weights=start.weights,
        momentum=None if like.momentum is None else start.momentum,
        anchor=None if like.anchor is None else start.weights,
        previous=None if like.previous is None else start.previous,
    )
    return jax.tree.map(lambda x, y: x.astype(y.dtype), start, like)


def batch_weights[W: Weights](initial_state: W, batch: int, dtype: jnp.dtype) -> W:
    """Return initial weights [H, ., .] or [B, H, ., .] as [B, H, ., .] in `dtype`."""

    def expand(leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(dtype)
        return jnp.broadcast_to(leaf[None], (batch, *leaf.shape)) if leaf.ndim == 3 else leaf

    return jax.tree.map(expand, initial_state)


def last_token(k: jax.Array, v: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return key [B, H, K] and value [B, H, V] of each row's last token, zeros where a row has none.

    Args:
      k: [B, T, H, K].
      v: [B, T, H, V].
      lengths: tokens of each row [B]; None: all.
    """
    dtype = state_dtype(k)
    if lengths is None:
        return k[:, -1].astype(dtype), v[:, -1].astype(dtype)
    last = jnp.maximum(lengths - 1, 0)[:, None, None, None]

    def at_last(x: jax.Array) -> jax.Array:
        x = jnp.take_along_axis(x, last, axis=1)[:, 0].astype(dtype)
        return jnp.where((lengths > 0)[:, None, None], x, jnp.zeros_like(x))

    return at_last(k), at_last(v)


def state_dtype(q: jax.Array) -> jnp.dtype:
    """Return the dtype of states, gates and gradients: float32, or float64 if the queries are."""
    return jnp.dtype(jnp.float64 if q.dtype == jnp.float64 else jnp.float32)


def select_rows[Tree](rows: jax.Array, chosen: Tree, other: Tree) -> Tree:
    """Return, leaf by leaf, `chosen` where `rows` [B] is true and `other` elsewhere."""

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(rows.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, chosen, other)

"""What an aggregation is: gates for the online and the cached memories.

Shapes: B batch, T tokens, H heads, N cached states, k states that a token selects.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Gates(NamedTuple):
    """Weights of the memories in a token's read; H is 1 where all heads read alike."""

    online: jax.Array
    """[B, T, H] of the online memory."""
    cached: jax.Array
    """[B, T, H, N] of the cached states, 0 where a state is not read."""


class Selection(NamedTuple):
    """Weights of the few states that a token selects."""

    online: jax.Array
    """[B, T, H] of the online memory."""
    cached: jax.Array
    """[B, T, H, k] of the selected states, 0 where there are fewer eligible ones."""
    indices: jax.Array
    """[B, T, H, k], int32: which ones."""

    def dense(self, states: int) -> Gates:
        """The same as gates on all of `states` cached ones."""
        chosen = jax.nn.one_hot(self.indices, states, dtype=self.cached.dtype)
        return Gates(self.online, jnp.einsum("bthk,bthkn->bthn", self.cached, chosen))


class Scores(NamedTuple):
    """What the router says of a token's memories."""

    cached: jax.Array
    """[B, T, H, N]."""
    online: jax.Array
    """[B, T, H], of the online memory, or of the null that the cached ones are weighed with."""


class Shares(NamedTuple):
    """How a token's reading is divided: what adds up to 1."""

    cached: jax.Array
    """[B, T, H, N] of the cached states, or [B, T, H, k] of the selected ones."""
    rest: jax.Array
    """[B, T, H] of the online memory, or of the null."""


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """One way to read the cache; what settings and plans must know of it is in `mc_jax.facts`."""

    gates: Callable[..., Gates] | None
    """(Scores or None, eligible [B, T, N], top_k or None) -> Gates; None: no cache is read."""
    select: Callable[[Scores, jax.Array, int], Selection] | None = None
    """The same as the few states that are read, with a top_k; None where all are."""


def shares_of(gates: Gates | Selection, *, has_null: bool) -> Shares:
    """A token's gates as shares; a null has what the gates of the cached memories leave of 1.

    Their sizes alone count: a learned scale of less than 0 reads a memory with the sign changed.
    """
    cached = jnp.abs(gates.cached)
    read = jnp.sum(cached, axis=-1)
    rest = jnp.maximum(1 - read, 0) if has_null else jnp.abs(gates.online)
    total = read + rest
    return Shares(cached / total[..., None], rest / total)


def softmax_gates(scores: Scores, readable: jax.Array) -> Gates:
    """One softmax over the readable cached states and the online memory (MC eq. 19).

    Args:
      scores: of all memories.
      readable: [B, T, H or 1, N], bool.
    """
    logits = jnp.concatenate(
        [jnp.where(readable, scores.cached, -jnp.inf), scores.online[..., None]], axis=-1
    )
    weights = jax.nn.softmax(logits, axis=-1)
    return Gates(online=weights[..., -1], cached=weights[..., :-1])

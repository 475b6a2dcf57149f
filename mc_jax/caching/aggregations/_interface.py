"""What an aggregation is: gates for the online and the cached memories.

Shapes: B batch, T tokens, H heads, N cached states.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Gates(NamedTuple):
    """Weights of the memories in a token's read."""

    online: jax.Array
    """[B, T, H] of the online memory."""
    cached: jax.Array
    """[B, T, H, N] of the cached states, 0 where a state is not eligible."""


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """One way to read the cache."""

    uses_router: bool
    """Whether the gates depend on scores; if not, scores and online logit are None."""
    gates: Callable[[jax.Array | None, jax.Array | None, jax.Array], Gates] | None
    """(scores [B, T, H, N], online logit [B, T, H], eligible [B, T, N]) -> Gates; None: no cache is read."""


def softmax_gates(scores: jax.Array, online_logit: jax.Array, readable: jax.Array) -> Gates:
    """One softmax over the readable cached states and the online memory (MC eq. 19).

    Args:
      scores: [B, T, H, N].
      online_logit: [B, T, H].
      readable: [B, T, H or 1, N], bool.
    """
    logits = jnp.concatenate([jnp.where(readable, scores, -jnp.inf), online_logit[..., None]], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)
    return Gates(online=weights[..., -1], cached=weights[..., :-1])

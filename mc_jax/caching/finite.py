"""Numbers that are not finite: where they come from, and which tokens they reach.

0 times NaN is NaN, so a matrix product with a mask of zeros carries it to tokens that must not see it. Here
the token is found out, worked on as zeros, and what depends on it made NaN afterwards.

Shapes: B batch, T tokens.
"""

import jax
import jax.numpy as jnp


def from_there_on(bad: jax.Array, document_ids: jax.Array | None) -> jax.Array:
    """Tokens at or after a bad one of their own document [B, T, ...], bool, from bad ones [B, T, ...].

    Args:
      bad: which are, bool.
      document_ids: [B, T]; None: a row is one document.
    """
    position = jnp.arange(bad.shape[1], dtype=jnp.int32).reshape(1, -1, *[1] * (bad.ndim - 2))
    last_bad = jax.lax.cummax(jnp.where(bad, position, -1), axis=1)
    if document_ids is None:
        return last_bad >= 0
    starts = jnp.pad(document_ids[:, 1:] != document_ids[:, :-1], ((0, 0), (1, 0)))
    starts = starts.reshape(*starts.shape, *[1] * (bad.ndim - 2))
    return last_bad >= jax.lax.cummax(jnp.where(starts, position, 0), axis=1)

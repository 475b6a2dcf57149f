"""Sparse selective caching (SSC): the top_k best-scored cached memories and the online one (MC eq. 16-17).

The choice is made per token and head; ties go to the older segment; one softmax over what is read.
"""

import jax
import jax.numpy as jnp

from mc_jax.caching.aggregations._interface import Aggregation, Gates, Scores, Selection, softmax_gates


def _gates(scores: Scores, eligible: jax.Array, top_k: jax.Array | int) -> Gates:
    readable = eligible[:, :, None]
    masked = jnp.where(readable, scores.cached, -jnp.inf)
    # Ranks by two sorts, and not `jax.lax.top_k`: top_k may be traced, while it is annealed.
    order = jnp.argsort(-jax.lax.stop_gradient(masked), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return softmax_gates(scores, readable & (rank < top_k))


def _select(scores: Scores, eligible: jax.Array, top_k: int) -> Selection:
    masked = jnp.where(eligible[:, :, None], scores.cached, -jnp.inf)
    best, indices = jax.lax.top_k(masked, min(top_k, masked.shape[-1]))
    gates = softmax_gates(Scores(best, scores.online), best > -jnp.inf)
    return Selection(gates.online, gates.cached, indices)


SPARSE = Aggregation(gates=_gates, select=_select)

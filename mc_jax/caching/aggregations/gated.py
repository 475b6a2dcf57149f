"""Gated residual memory (GRM): a context-dependent weighted mean of all memories (MC eq. 8-10)."""

import jax

from mc_jax.caching.aggregations._interface import Aggregation, Gates, softmax_gates


def _gates(scores: jax.Array, online_logit: jax.Array, eligible: jax.Array) -> Gates:
    return softmax_gates(scores, online_logit, eligible[:, :, None])


GATED = Aggregation(uses_router=True, gates=_gates)

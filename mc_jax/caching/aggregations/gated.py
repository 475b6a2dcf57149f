"""Gated residual memory (GRM): a context-dependent weighted mean of all memories (MC eq. 8-10)."""

import jax

from mc_jax.caching.aggregations._interface import Aggregation, Gates, Scores, softmax_gates


def _gates(scores: Scores, eligible: jax.Array, top_k: None) -> Gates:
    return softmax_gates(scores, eligible[:, :, None])


GATED = Aggregation(gates=_gates)

"""Residual memory: the online read plus the sum of all cached reads (MC eq. 6)."""

import jax
import jax.numpy as jnp

from mc_jax.caching.aggregations._interface import Aggregation, Gates


def _gates(scores: None, eligible: jax.Array, top_k: None) -> Gates:
    return Gates(
        online=jnp.ones(eligible.shape[:2], float)[..., None],
        cached=eligible.astype(float)[:, :, None],
    )


RESIDUAL = Aggregation(gates=_gates)

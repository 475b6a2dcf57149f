"""Residual memory: the online read plus the sum of all cached reads (MC eq. 6)."""

import jax
import jax.numpy as jnp

from mc_jax.caching.aggregations._interface import Aggregation, Gates


def _gates(scores, online_logit, eligible: jax.Array) -> Gates:
    # One head's worth, broadcast by the caller's shapes: all heads read alike.
    return Gates(
        online=jnp.ones(eligible.shape[:2], jnp.float32)[..., None],
        cached=eligible.astype(jnp.float32)[:, :, None],
    )


RESIDUAL = Aggregation(uses_router=False, gates=_gates)

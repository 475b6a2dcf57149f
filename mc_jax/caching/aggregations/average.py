"""Equal weights over the online and the most recent top_k cached memories (MC section 4.3): no parameters."""

import jax
import jax.numpy as jnp

from mc_jax.caching.aggregations._interface import Aggregation, Gates


def _gates(scores: None, eligible: jax.Array, top_k: jax.Array | int) -> Gates:
    rank = jnp.cumsum(eligible[..., ::-1], axis=-1)[..., ::-1]  # 1 is the most recent
    read = (eligible & (rank <= top_k)).astype(float)
    share = 1.0 / (1.0 + jnp.sum(read, axis=-1))
    return Gates(online=share[..., None], cached=(read * share[..., None])[:, :, None])


AVERAGE = Aggregation(gates=_gates)

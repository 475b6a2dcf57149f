"""The online memory whole, and a softmax over the cached memories and a null that reads nothing.

y = M_t(q) + sum_i pi_i M_i(q): what MARCH (arXiv:2608.12435) reads. The online memory is never scaled down,
and a token that needs nothing of the past gives its weight to the null, whose logit takes the place of the
online memory's. Without top_k all cached memories are read; with it, the top_k best-scored.
"""

import jax
import jax.numpy as jnp

from mc_jax.caching.aggregations._interface import Aggregation, Gates, Scores, Selection
from mc_jax.caching.aggregations.gated import GATED
from mc_jax.caching.aggregations.sparse import SPARSE


def _gates(scores: Scores, eligible: jax.Array, top_k: jax.Array | int | None) -> Gates:
    weighed = GATED if top_k is None else SPARSE
    assert weighed.gates is not None
    gates = weighed.gates(scores, eligible, top_k)
    return gates._replace(online=jnp.ones_like(gates.online))


def _select(scores: Scores, eligible: jax.Array, top_k: int) -> Selection:
    assert SPARSE.select is not None
    selection = SPARSE.select(scores, eligible, top_k)
    return selection._replace(online=jnp.ones_like(selection.online))


NULL = Aggregation(gates=_gates, select=_select)

"""From the router's scores to what a token reads: one path for the parallel form and for decoding.

Shapes: B batch, T tokens, H heads, N cached states, R router dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.caching import logarithmic
from mc_jax.caching.aggregations import AGGREGATIONS, Gates, Scores, Selection
from mc_jax.caching.settings import Settings
from mc_jax.memories import Memory
from pallas_kernels._platform import platform
from pallas_kernels._state import Weights

# From how many cached states for each selected one on, tokens are grouped by state, and not all states read
# with most gates zero. Measured on two CPU cores, forward and backward (docs/results.md): both take as long
# at 3 to 6, whatever the dims and top_k.
GROUPED_FROM = 8
# The same where both are kernels of a TPU, by their schedules and copies, where neighbours agree as in a
# trained model (docs/results.md): as long at 16 on v5e and v5p and at 22 on v6e and tpu7x.
GROUPED_FROM_ON_TPU = 20


class Routing(NamedTuple):
    """What the reads of the cache need of each token, [B, T, H, ...], or [B, H, ...] in decoding."""

    u: jax.Array | None
    """The router's query [..., H, R]; None without a router, like `keys`."""
    keys: jax.Array | None
    """What is pooled over a segment [..., H, R]."""
    online_logit: jax.Array | None
    """A learned logit for the online memory [..., H]; None: the running mean of `keys` is scored."""
    cache_scale: jax.Array | None = None
    """What the cache changes of a read counts by this factor [..., H]; None: by 1."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cached:
    """The cached memories of a batch, as they are read."""

    states: Weights
    """[B, N, H, ...]."""
    tokens: jax.Array
    """Tokens that a state was written by since its segment's or document's start [B, N], float."""
    log_retention: jax.Array | None
    """Sum of log a over those tokens [B, N, H]; None where segments are not merged."""


def choose(
    settings: Settings,
    scores: Scores | None,
    eligible: jax.Array,
    cached: Cached,
    top_k: jax.Array | None,
    first: jax.Array | None = None,
) -> Gates | Selection:
    """The weights of all memories in each token's read.

    Args:
      settings: how the cache is read.
      scores: of the memories; None without a router.
      eligible: [B, T, N], bool.
      cached: the cached memories.
      top_k: scalar that takes the place of the settings', while it is annealed; None: theirs.
      first: the first memory of each one's document [B, N], int32; None: all are of one.
    """
    aggregation = AGGREGATIONS[settings.aggregation]
    assert aggregation.gates is not None
    if settings.segmentation == "logarithmic":
        assert scores is not None
        groups = logarithmic.groups(eligible)
        gates = logarithmic.group_gates(scores, cached.tokens, groups)
        if settings.segment_init == "checkpoint":
            return logarithmic.checkpoint_gates(gates, groups, eligible.shape[-1])
        assert cached.log_retention is not None
        return logarithmic.merged_gates(gates, groups, cached.log_retention, first)
    if settings.selects and top_k is None and _is_grouped(settings, eligible, cached.states):
        assert aggregation.select is not None
        assert scores is not None
        assert settings.top_k is not None
        return aggregation.select(scores, eligible, settings.top_k)
    return aggregation.gates(scores, eligible, settings.top_k if top_k is None else top_k)


def scaled(gates: Gates | Selection, scale: jax.Array | None) -> Gates | Selection:
    """Gates with which a read is (1 - s) M_t(q) + s (the read of these): by a scale of 0, the online memory.

    Args:
      gates: of all memories.
      scale: s [B, T, H]; None: 1.
    """
    if scale is None:
        return gates
    scale = scale.astype(gates.online.dtype)
    # In this order a scale of 0 leaves the online memory a weight of 1 to the bit.
    return gates._replace(online=1 + scale * (gates.online - 1), cached=scale[..., None] * gates.cached)


def combine(
    memory: Memory,
    q: jax.Array,
    online_read: jax.Array,
    gates: Gates | Selection | None,
    states: Weights,
    segment_length: int | None,
) -> jax.Array:
    """The weighted sum of all queried memories [B, T, H, V] (MC eq. 8), in the dtype of states.

    A `segment_length` promises that token t reads only states n < t // segment_length.
    """
    dtype = jax.tree.leaves(states)[0].dtype
    y = online_read.astype(dtype)
    if gates is not None:
        y = gates.online[..., None].astype(dtype) * y
        cached = jnp.broadcast_to(gates.cached, (*q.shape[:3], gates.cached.shape[-1]))
        if isinstance(gates, Selection):
            read = memory.read_selected(q, cached, gates.indices, states)
        else:
            read = memory.read(q, cached, states, segment_length)
        y = y + read.astype(dtype)
    skip = memory.skip(q)
    return y if skip is None else y + skip.astype(dtype)


def _is_grouped(settings: Settings, eligible: jax.Array, weights: Weights) -> bool:
    if settings.selected_read is not None:
        return settings.selected_read == "grouped"
    assert settings.top_k is not None
    _, tokens, states = eligible.shape
    # There is nothing to group in a single token, in decoding: only the states it selects are touched.
    if tokens == 1:
        return states > settings.top_k
    least = GROUPED_FROM
    if platform() == "tpu" and not isinstance(weights, tuple):
        least = GROUPED_FROM_ON_TPU
    return states >= least * settings.top_k

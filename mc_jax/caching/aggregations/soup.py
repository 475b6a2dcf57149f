"""Memory soup: one memory whose weights are the gated mean of all memories' weights (MC eq. 14-15).

The gates are those of "gated". On a matrix the two are the same; on an MLP they are not.
"""

from mc_jax.caching.aggregations.gated import GATED

SOUP = GATED

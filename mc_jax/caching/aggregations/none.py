"""The base recurrence: only the online memory is read."""

from mc_jax.caching.aggregations._interface import Aggregation

NONE = Aggregation(gates=None)

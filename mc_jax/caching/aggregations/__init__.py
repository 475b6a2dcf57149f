"""The aggregations, by name. A new one is one file here and one entry in `AGGREGATIONS`."""

from mc_jax.caching.aggregations._interface import Aggregation, Gates
from mc_jax.caching.aggregations.gated import GATED
from mc_jax.caching.aggregations.none import NONE
from mc_jax.caching.aggregations.residual import RESIDUAL

AGGREGATIONS: dict[str, Aggregation] = {
    "none": NONE,
    "residual": RESIDUAL,
    "gated": GATED,
}

__all__ = ["AGGREGATIONS", "Aggregation", "Gates"]

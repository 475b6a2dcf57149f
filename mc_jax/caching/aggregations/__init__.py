"""The aggregations, by name. A new one is one file here, an entry here, and one in `mc_jax.facts`."""

from mc_jax.caching.aggregations._interface import Aggregation, Gates, Scores, Selection, Shares, shares_of
from mc_jax.caching.aggregations.average import AVERAGE
from mc_jax.caching.aggregations.gated import GATED
from mc_jax.caching.aggregations.none import NONE
from mc_jax.caching.aggregations.null import NULL
from mc_jax.caching.aggregations.residual import RESIDUAL
from mc_jax.caching.aggregations.soup import SOUP
from mc_jax.caching.aggregations.sparse import SPARSE

AGGREGATIONS: dict[str, Aggregation] = {
    "none": NONE,
    "residual": RESIDUAL,
    "gated": GATED,
    "soup": SOUP,
    "sparse": SPARSE,
    "average": AVERAGE,
    "null": NULL,
}

__all__ = ["AGGREGATIONS", "Aggregation", "Gates", "Scores", "Selection", "Shares", "shares_of"]

"""The paper: segments, cache, router, aggregation."""

from mc_jax.caching.cache import Cache
from mc_jax.caching.continuation import empty
from mc_jax.caching.core import decode, memory_caching
from mc_jax.caching.finite import seen_by_convolution
from mc_jax.caching.neighbours import Neighbours
from mc_jax.caching.reading import Routing
from mc_jax.caching.rows import Output, forward, forward_from, forward_shared
from mc_jax.caching.settings import Settings
from mc_jax.caching.storage import Storage

__all__ = [
    "Cache",
    "Neighbours",
    "Output",
    "Routing",
    "Settings",
    "Storage",
    "decode",
    "empty",
    "forward",
    "forward_from",
    "forward_shared",
    "memory_caching",
    "seen_by_convolution",
]

"""The paper: segments, cache, router, aggregation."""

from mc_jax.caching.cache import Cache
from mc_jax.caching.core import Output, decode, forward, memory_caching
from mc_jax.caching.reading import Routing
from mc_jax.caching.settings import Settings
from mc_jax.caching.storage import Storage

__all__ = ["Cache", "Output", "Routing", "Settings", "Storage", "decode", "forward", "memory_caching"]

"""mc_jax: recurrent language models with growing memory (Memory Caching, arXiv:2602.24281)."""

# As that of `typing`, whose import would leave Ctrl-C unheard for twice as long.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from mc_jax._selftest import selftest
    from mc_jax.caching import memory_caching

__all__ = ["memory_caching", "selftest"]


def __getattr__(name: str) -> object:
    # On first use: the command line tells of a mistake without waiting for jax.
    if name == "memory_caching":
        from mc_jax.caching import memory_caching

        return memory_caching
    if name == "selftest":
        from mc_jax._selftest import selftest

        return selftest
    raise AttributeError(f"module 'mc_jax' has no attribute {name!r}")

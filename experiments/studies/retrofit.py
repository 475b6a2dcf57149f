"""A memory given to a recurrence that was trained without one: its router alone trained, or all of it.

The quickstart without caches, then a tenth of its steps from there: without a cache, with one whose router
and scale alone are trained, and with one beside all other weights. Three seeds take an hour on two cores.
"""

from experiments.studies import Study

_MORE = ("--training.steps", "44", "--training.warmup-steps", "4", "--training.learning-rate", "2e-3")
_ROUTER = ("router_query", "router_key", "online_logit", "cache_scale")
_MEMORY = (*_MORE, "--model.aggregation", "gated", "--model.cache-scale", "learned", "--init-new", *_ROUTER)


def study() -> Study:
    """All are read as they were trained and with their caches off, by position too."""
    return Study(
        recipe="quickstart",
        variants={
            "base": ("--model.aggregation", "none"),
            "longer": _MORE,
            "router": (*_MEMORY, "--training.train", *_ROUTER),
            "whole": _MEMORY,
        },
        begins_with=dict.fromkeys(("longer", "router", "whole"), "base"),
        sweep=("--mode", "windows", "by-position", "--aggregation", "none"),
    )

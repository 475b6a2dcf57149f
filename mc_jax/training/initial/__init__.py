"""Weights to begin with that another run has trained: found, compared with the model, taken, written down.

A run's own checkpoints come first: what it began from is read while it has none, and then no more.
"""

from mc_jax.training.initial.provenance import (
    INIT_FILE,
    Provenance,
    read_provenance,
    settings_of,
    write_provenance,
)
from mc_jax.training.initial.source import Init, find_source
from mc_jax.training.initial.weights import examine, initial_state, must_be_there

__all__ = [
    "INIT_FILE",
    "Init",
    "Provenance",
    "examine",
    "find_source",
    "initial_state",
    "must_be_there",
    "read_provenance",
    "settings_of",
    "write_provenance",
]

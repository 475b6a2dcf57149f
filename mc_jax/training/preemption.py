"""The step at which a run stops because of a signal."""

import jax
from jax.experimental import multihost_utils

from mc_jax import stop_signals


def stops_at(step: int) -> bool:
    """Whether the run must stop with this step; to be asked once a step, by all processes.

    From the first step on there is something to save, so a signal no longer ends the program at once. Several
    processes agree on a step that none of them has passed yet.
    """
    signals = stop_signals.current()
    signals.finish_first()
    if jax.process_count() == 1:
        return signals.heard is not None
    return multihost_utils.reached_preemption_sync_point(step)

"""The notice that this machine will be taken away (SIGTERM), and the step at which to stop."""

import signal
import threading
import types
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Hears of a SIGTERM, here or in another process; a context manager.

    Where there are several processes, JAX hears the signal, and they agree on a step that none of them has
    passed yet. A single one hears it in the main thread alone, for Python's signals are heard nowhere else.
    """

    def __init__(self):
        self._is_noticed = False
        self._earlier: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        if jax.process_count() == 1 and _is_main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *exception: object) -> None:
        if _is_main_thread():
            signal.signal(signal.SIGTERM, self._earlier)

    def stops_at(self, step: int) -> bool:
        """Whether the run must stop with this step; to be asked once a step, by all processes."""
        if jax.process_count() == 1:
            return self._is_noticed
        return multihost_utils.reached_preemption_sync_point(step)

    def _notice(self, signum: int, frame: types.FrameType | None) -> None:
        self._is_noticed = True


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

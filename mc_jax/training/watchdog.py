"""Tells where a run is stuck: all stacks of Python, when a step takes far longer than usual."""

import collections
import faulthandler
import statistics
import sys
import threading
import time
from typing import Self, TextIO

_TIMES_THE_USUAL = 20
_STEPS_REMEMBERED = 100


class Watchdog:
    """Prints the stacks of all threads once a stuck step, and ends nothing; a context manager.

    A step is stuck when it takes longer than `least` and than 20 times the median of the last 100 steps.

    Args:
      least: seconds that any step may take.
      first: seconds that the first one may take, in which the step is compiled.
      file: where to print, with a file descriptor; None: stderr.
    """

    def __init__(self, *, least: float = 60.0, first: float = 1800.0, file: TextIO | None = None):
        self._least, self._first = least, first
        self._file = file
        self._seconds: collections.deque[float] = collections.deque(maxlen=_STEPS_REMEMBERED)
        self._began = time.monotonic()
        self._step: int | None = None  # the last one that was done
        self._is_measuring = False
        self._is_over = False
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join()

    def done(self, step: int, *, measures: bool = False) -> None:
        """A step is done, and the next one has begun.

        Or something is measured first, which may take as long as the first step: call it again after that.
        """
        now = time.monotonic()
        with self._changed:
            if self._step is not None and not self._is_measuring:  # the first one was compiled
                self._seconds.append(now - self._began)
            self._step, self._began, self._is_measuring = step, now, measures
            self._changed.notify()

    def _limit(self) -> float:
        """Seconds that the step in hand may take."""
        if self._is_measuring or not self._seconds:
            return self._first
        return max(self._least, _TIMES_THE_USUAL * statistics.median(self._seconds))

    def _watch(self) -> None:
        with self._changed:
            while not self._is_over:
                began, limit = self._began, self._limit()
                if not self._wait_for_another_than(began, began + limit - time.monotonic()):
                    self._print(limit)
                    self._wait_for_another_than(began, None)

    def _wait_for_another_than(self, began: float, seconds: float | None) -> bool:
        return self._changed.wait_for(lambda: self._is_over or self._began != began, seconds)

    def _print(self, limit: float) -> None:
        file = sys.stderr if self._file is None else self._file
        after = "the first step" if self._step is None else f"the step after step {self._step}"
        after = f"what is measured after step {self._step}" if self._is_measuring else after
        usual = f", and {statistics.median(self._seconds):.3g} s is usual" if self._seconds else ""
        print(
            f"mc-jax: {after} has taken {limit:.3g} s so far{usual}; all threads are here:",
            file=file,
            flush=True,
        )
        faulthandler.dump_traceback(file)

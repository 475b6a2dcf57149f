"""Signals that ask this program to end: SIGINT (Ctrl-C), SIGTERM and SIGHUP.

They are blocked, and a thread waits for them. So KeyboardInterrupt is never raised inside a library that
cannot take it, and a signal is heard while the main thread compiles, waits for a device, or hangs.
"""

import contextlib
import os
import signal
import stat
import threading
import time
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A wrapper such as uv passes on what the terminal has sent to its child already.
_SECONDS_OF_ONE_PRESS = 0.3
_SECONDS_TO_END = 30.0  # after an error: the threads of a library that waits for a disk may never end
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it
_START_OF_LINE = b"\r\x1b[K"
_STOPPING = "stopping at the next step, which is saved; Ctrl-C ends at once"
_AT_ONCE = "ended at once by Ctrl-C; the same command goes on from the newest checkpoint"


class StopSignals:
    """Ends this program at the first signal, or at a time that suits it; a context manager.

    At first any signal ends it at once. Between `finish_first` and `end_at_once` the program looks at `heard`
    and ends by itself. A second Ctrl-C ends it in any case. A signal that is ignored, as SIGHUP is under
    nohup, stays so.
    """

    def __init__(self):
        self.heard: signal.Signals | None = None
        """The first signal that came."""
        self.words = "interrupted"
        """What is told where a signal ends the program at once; {signal} in it is the signal's name."""
        self.codes: dict[signal.Signals, int] = {number: 128 + number for number in SIGNALS}
        """What the program ends with."""
        self.pass_on: Callable[[signal.Signals], None] | None = None
        """Called with a signal that does not end the program at once."""
        self.tidy: Callable[[], None] | None = None
        """Called before the program ends at once."""
        self._is_finishing = False
        self._last_press = 0.0
        self._is_awaited = False
        """Whether the press of Ctrl-C that another process has told of is yet to come here."""
        self._is_over = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._unblocked: set[signal.Signals] = set()

    def __enter__(self) -> "StopSignals":
        global _current
        if threading.current_thread() is threading.main_thread():  # Python sees to signals there alone
            signals = {number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
            # Threads that are started from here on inherit the mask.
            self._unblocked = signals - signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            self._thread = threading.Thread(target=self._listen, args=(signals,), name="signals", daemon=True)
            self._thread.start()
            _current = self
        return self

    def __exit__(self, *exception: object) -> None:
        global _current
        if self._thread is None or self._thread.ident is None:
            return
        self._is_over = True
        signal.pthread_kill(self._thread.ident, signal.SIGTERM)
        self._thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._unblocked)
        _current = _NOBODY

    @property
    def name(self) -> str:
        """What users call the signal that was heard."""
        if self.heard is None:
            return "a signal"
        return "Ctrl-C" if self.heard == signal.SIGINT else self.heard.name

    @property
    def code(self) -> int:
        """What the program ends with because of the signal that was heard."""
        assert self.heard is not None
        return self.codes[self.heard]

    def finish_first(self) -> None:
        """From here on the program ends by itself after a signal."""
        with self._lock:
            self._is_finishing = True

    def end_at_once(self, words: str) -> None:
        """From here on a signal ends the program at once, with these words."""
        with self._lock:
            self._is_finishing = False
            self.words = words

    def end_soon(self, code: int) -> None:
        """End with this code, even where a thread hangs that Python waits for at its end."""
        if self._thread is not None:
            end = threading.Timer(_SECONDS_TO_END, os._exit, (code,))
            end.daemon = True
            end.start()

    def give_way(self) -> None:
        """Wait for the end, if a signal is ending the program."""
        with self._lock:
            pass

    def hear_of(self, number: signal.Signals) -> None:
        """Act on a signal that another process of this run has heard, which asks once."""
        if self.heard is None:
            self._is_awaited = number == signal.SIGINT
            self.hear(number)

    def hear(self, number: signal.Signals) -> None:
        """Act on a signal."""
        with self._lock:
            is_first = self.heard is None
            now, before = time.monotonic(), self._last_press
            if number == signal.SIGINT and not (is_first and self._is_awaited):
                self._last_press = now
            if is_first:
                self.heard = number
            if not self._is_finishing:
                self._end(self.words.format(signal=self.name), self.code)
            elif is_first:
                _tell(_STOPPING)
            elif number == signal.SIGINT and now - before > _SECONDS_OF_ONE_PRESS:
                if not self._is_awaited:
                    self._end(_AT_ONCE, self.codes[number])
                self._is_awaited = False
        if is_first and self.pass_on is not None:
            self.pass_on(number)

    def _listen(self, signals: set[signal.Signals]) -> None:
        while True:
            number = signal.Signals(signal.sigwait(signals))
            if self._is_over:
                return
            if number == signal.SIGHUP:
                _forget_terminal()
            self.hear(number)

    def _end(self, words: str, code: int) -> None:
        with contextlib.suppress(OSError):
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)
        _tell(words)
        if self.tidy is not None:
            with contextlib.suppress(Exception):
                self.tidy()
        os._exit(code)  # the main thread may be where no exception helps


def current() -> StopSignals:
    """What listens in this program; where nothing does, one that never hears of a signal."""
    return _current


_NOBODY = StopSignals()
_current = _NOBODY


def _tell(words: str) -> None:
    """Print a line, whatever the main thread holds."""
    start = _START_OF_LINE if os.isatty(2) else b""
    with contextlib.suppress(OSError):
        os.write(2, start + f"mc-jax: {words}\n".encode())


def _forget_terminal() -> None:
    """Let what is printed go nowhere instead of failing, where it went to a terminal that is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)

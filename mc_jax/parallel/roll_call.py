"""The roll call of a run's processes: who has come, and who is gone.

JAX's own service ends a process with a stack trace of C++ where another one never comes or dies. Here each
process holds a TCP connection to process 0. It is made before JAX starts, at the address that JAX's service
will have, so a run needs one port. The kernel closes the connections of a process that dies, and its
keep-alive probes find a machine that fell silent: no thread has to answer, so a busy process is not taken
for a dead one.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mc_jax import stop_signals
from mc_jax.parallel.gathering import gather, interface_of, own_name, report

# An error that hits all processes is told by each of them within this time, and nobody is blamed for it.
_SECONDS_TO_FAIL_TOGETHER = 5.0
_SECONDS_TO_END_TOGETHER = 2.0


class RollCall:
    """A process's connections to the others, from a run's start to its end.

    Args:
      address: host and port of process 0.
      count: N, the number of processes.
      index: of this one; the others connect to process 0.
      patience: seconds within which all must have come.
      part: called before this process ends because another one failed, which is still there to part from.

    Raises:
      ValueError: not all came, or they do not agree on N or on who is who.
    """

    def __init__(
        self,
        address: tuple[str, int],
        count: int,
        index: int,
        *,
        patience: float,
        part: Callable[[], None],
    ):
        self._index = index
        self._part = part
        self.interface = interface_of(address) if index == 0 else ""
        """The address that process 0 listens on; "" stands for all."""
        self._links = (
            gather(self.interface, address[1], count, patience)
            if index == 0
            else report(address, count, index, patience)
        )
        self._left: set[int] = set()
        self._is_ending = False
        self._changed = threading.Condition()
        self._listeners = [
            threading.Thread(target=self._listen, args=(other,), name="roll call", daemon=True)
            for other in self._links
        ]
        for listener in self._listeners:
            listener.start()

    def leave(self) -> None:
        """Wait until all processes have come here, at the end of their work."""
        with self._changed:
            if self._index == 0:
                self._changed.wait_for(lambda: len(self._left) == len(self._links))
            else:
                self._links[0].send(left=self._index)
                self._changed.wait_for(lambda: self._left)
            self._is_ending = True
        if self._index == 0:
            self._tell(left=0)

    def fail(self, reason: str) -> None:
        """Let the others know that this process ends with an error."""
        with self._changed:
            self._is_ending = True
        self._tell(failed=self._index, name=own_name(), reason=reason)

    def pass_on(self, number: signal.Signals) -> None:
        """Let all others hear of a signal that asked this process to stop."""
        self._tell(signal=number.value)

    def end_all(self, number: signal.Signals) -> None:
        """End all others as this process, 0, ends, because of a signal and with nothing left to save."""
        with self._changed:
            self._is_ending = True
        self._tell(ended=number.value)
        # JAX's service ends with this process, and would end in its way those that have not heard yet.
        deadline = time.monotonic() + _SECONDS_TO_END_TOGETHER
        for listener in set(self._listeners) - {threading.current_thread()}:
            listener.join(max(0.0, deadline - time.monotonic()))

    def wait_for_bad_news(self) -> None:
        """Wait a while for this process to be ended because of another one."""
        time.sleep(_SECONDS_TO_FAIL_TOGETHER)

    def _listen(self, other: int) -> None:
        """Hear another process, until it has left or this one ends because of it."""
        link = self._links[other]
        for message in link.messages():
            if "left" in message:
                with self._changed:
                    self._left.add(other)
                    self._changed.notify_all()
            elif "signal" in message:
                stop_signals.current().hear_of(signal.Signals(message["signal"]))
            elif "ended" in message:
                os._exit(stop_signals.current().codes[signal.Signals(message["ended"])])
            elif "reason" in message or "gone" in message:
                if message.get("failed") == other:
                    time.sleep(_SECONDS_TO_FAIL_TOGETHER)
                self._end(message)
        if other not in self._left:
            self._end({"gone": other, "name": link.name})

    def _end(self, message: dict[str, Any]) -> None:
        """End this process because of another one, and tell all others why."""
        with self._changed:
            if self._is_ending:
                return
            self._is_ending = True
        if self._index == 0:
            self._tell(**message)
        if "failed" in message:
            reason = f"process {message['failed']} ({message['name']}) failed: {message['reason']}"
        else:
            reason = f"process {message['gone']} ({message['name']}) is gone"
        _tell_user(f"{reason}; start all processes again, and the run goes on from its newest checkpoint")
        if "failed" in message:
            with contextlib.suppress(Exception):
                self._part()
        os._exit(1)  # the main thread may be in a collective that never ends

    def _tell(self, **message: Any) -> None:
        for link in self._links.values():
            link.send(**message)


def _tell_user(reason: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(f"mc-jax: error: {reason}", file=sys.stderr, flush=True)

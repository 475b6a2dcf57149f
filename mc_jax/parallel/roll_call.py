"""The roll call of a run's processes: who has come, and who is gone.

JAX's own service ends a process with a stack trace of C++ where another one never comes or dies. Here each
process holds a TCP connection to process 0. It is made before JAX starts, at the address that JAX's service
will have, so a run needs one port. The kernel closes the connections of a process that dies, and its
keep-alive probes find a machine that fell silent: no thread has to answer, so a busy process is not taken
for a dead one.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

_GREETING = "mc-jax roll call 1"
# A silent machine is found after 10 + 5 * 4 seconds.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
_SECONDS_TO_GREET = 5.0
_SECONDS_BETWEEN_TRIES = 0.2
# An error that hits all processes is told by each of them within this time, and nobody is blamed for it.
_SECONDS_TO_FAIL_TOGETHER = 5.0


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
        self._links = (
            _gather(address[1], count, patience) if index == 0 else _report(address, count, index, patience)
        )
        self._left: set[int] = set()
        self._is_ending = False
        self._changed = threading.Condition()
        for other in self._links:
            threading.Thread(target=self._listen, args=(other,), name="roll call", daemon=True).start()

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
        self._tell(failed=self._index, name=_own_name(), reason=reason)

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
            else:
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


class _Link:
    """A connection over which JSON objects go, one a line."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE.items():
            if hasattr(socket, option):  # Linux has all, others some
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.name = ""
        self._connection = connection
        self._lines = connection.makefile(encoding="utf-8")

    def send(self, **message: Any) -> None:
        """Send; what cannot be sent is nobody's loss, for who listens hears of the end."""
        with contextlib.suppress(OSError):
            self._connection.sendall(f"{json.dumps(message)}\n".encode())

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next message; {} if none comes, or nonsense."""
        self._connection.settimeout(max(0.01, seconds))
        try:
            message = json.loads(self._lines.readline(1 << 16))
        except (OSError, ValueError):
            return {}
        self._connection.settimeout(None)
        return message if isinstance(message, dict) else {}

    def messages(self) -> Iterator[dict[str, Any]]:
        """All that comes, until the other end is closed."""
        with contextlib.suppress(OSError, ValueError):
            for line in self._lines:
                yield json.loads(line)

    def close(self) -> None:
        self._lines.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _gather(port: int, count: int, patience: float) -> dict[int, _Link]:
    """In process 0: the connections of all others, by index."""
    deadline = time.monotonic() + patience
    links: dict[int, _Link] = {}
    try:
        with _listening(port) as server:
            while len(links) < count - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    link = _Link(server.accept()[0])
                except TimeoutError:
                    missing = ", ".join(str(other) for other in range(1, count) if other not in links)
                    came = len(links) + 1
                    raise ValueError(
                        f"{came} of {count} processes came within {patience:g} s, missing: {missing}; "
                        "see what they print, or correct --processes.count"
                    ) from None
                greeting = link.receive(_SECONDS_TO_GREET)
                if greeting.get("greeting") != _GREETING:
                    link.close()  # not one of us
                    continue
                link.name, other = greeting["name"], greeting["index"]
                if greeting["count"] != count or other in (0, *links):
                    link.send(error=(error := _disagreement(link.name, greeting, count)))
                    raise ValueError(error)
                links[other] = link
    except ValueError as error:
        for link in links.values():
            link.send(error=str(error))
        raise
    for link in links.values():
        link.send(name=_own_name())
    return links


def _report(address: tuple[str, int], count: int, index: int, patience: float) -> dict[int, _Link]:
    """In another process: its connection to process 0, once all have come."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            link = _Link(socket.create_connection(address, timeout=max(0.01, deadline - time.monotonic())))
        except OSError:  # it is not there yet, or its name is not known yet
            time.sleep(_SECONDS_BETWEEN_TRIES)
            continue
        link.send(greeting=_GREETING, index=index, count=count, name=_own_name())
        # Process 0 may have started later, and so may give up later.
        answer = link.receive(deadline - time.monotonic() + patience)
        if "error" in answer:
            raise ValueError(answer["error"])
        if "name" in answer and "greeting" not in answer:
            link.name = answer["name"]
            return {0: link}
        link.close()  # an older run that is ending has the port, or nobody, and we talk to ourselves
        time.sleep(_SECONDS_BETWEEN_TRIES)
    raise ValueError(
        f"process 0 did not answer at {address[0]}:{address[1]} within {patience:g} s; "
        "see what it prints, or correct --processes.coordinator"
    )


def _listening(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _disagreement(name: str, greeting: dict[str, Any], count: int) -> str:
    if greeting["count"] != count:
        return (
            f"process {greeting['index']} ({name}) was told of {greeting['count']} processes, process 0 of "
            f"{count}; give all the same --processes.count"
        )
    return f"two processes have the index {greeting['index']}; give each its own --processes.index"


def _own_name() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"


def _tell_user(reason: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(f"mc-jax: error: {reason}", file=sys.stderr, flush=True)

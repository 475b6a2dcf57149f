"""How the processes of a run come together: a TCP connection from each to process 0.

Process 0 listens on the coordinator's interface alone, and until all have come. What comes there and is no
greeting of this run is dropped, and counted in the message if some do not come.
"""

import contextlib
import ipaddress
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

_GREETING = "mc-jax roll call 2"
# A silent machine is found after 10 + 5 * 4 seconds.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
_SECONDS_TO_GREET = 5.0
_SECONDS_BETWEEN_TRIES = 0.2
_SECONDS_BETWEEN_LOOKS = 0.05
_MOST_GUESTS = 256  # connections that may be about to greet at once
_LONGEST_MESSAGE = 8192  # bytes
_LONGEST_NAME = 300  # characters


class Link:
    """A connection over which JSON objects go, one a line."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE.items():
            if hasattr(socket, option):  # Linux has all, others some
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.name = ""
        self._connection = connection
        self._received = b""

    def send(self, **message: Any) -> None:
        """Send; what cannot be sent is nobody's loss, for who listens hears of the end."""
        with contextlib.suppress(OSError):
            self._connection.sendall(f"{json.dumps(message)}\n".encode())

    def receive(self, seconds: float) -> dict[str, Any]:
        """The message that comes within some seconds; {} if none does, or nonsense."""
        line = self._line(time.monotonic() + seconds)
        return {} if line is None else _message(line)

    def messages(self) -> Iterator[dict[str, Any]]:
        """All that comes, nonsense as {}, until the other end is closed."""
        while (line := self._line(None)) is not None:
            yield _message(line)

    def is_closed(self) -> bool:
        """Whether the other end is closed already."""
        self._connection.settimeout(0.0)
        try:
            return not self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self._connection.settimeout(None)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _line(self, deadline: float | None) -> bytes | None:
        """The next line; None where the other end is closed, says too much, or is too slow."""
        while b"\n" not in self._received:
            if len(self._received) > _LONGEST_MESSAGE:
                return None
            seconds = None if deadline is None else deadline - time.monotonic()
            try:
                if seconds is not None and seconds <= 0:
                    return None
                self._connection.settimeout(seconds)
                piece = self._connection.recv(_LONGEST_MESSAGE)
            except OSError:
                return None
            if not piece:
                return None
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        return line


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


class _Greeting(NamedTuple):
    """What a process says of itself when it comes."""

    index: int
    count: int
    """Number of processes that it was told of."""
    name: str


def _greeting(message: dict[str, Any]) -> _Greeting | None:
    """A greeting that a process of some run can have sent; None: nonsense."""
    index, count, name = (message.get(key) for key in _Greeting._fields)
    if message.get("greeting") != _GREETING or type(index) is not int or type(count) is not int:
        return None
    if not 0 <= index < count or not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return None
    return _Greeting(index, count, name)


def gather(interface: str, port: int, count: int, patience: float) -> dict[int, Link]:
    """In process 0: the connections of all others, by index."""
    deadline = time.monotonic() + patience
    links: dict[int, Link] = {}
    guests = _Guests()
    try:
        with _listening(interface, port) as server:
            while len(links) < count - 1 or _drop_closed(links):
                if time.monotonic() > deadline:
                    raise ValueError(_missing(count, links, guests.strangers, patience))
                guests.let_in(server)
                for link, greeting in guests.greeted():
                    link.name = greeting.name
                    if error := _disagreement(greeting, count, links):
                        link.send(error=error)
                        raise ValueError(error)
                    links[greeting.index] = link
    except ValueError as error:
        for link in links.values():
            link.send(error=str(error))
        raise
    for link in links.values():
        link.send(name=own_name())
    return links


def _drop_closed(links: dict[int, Link]) -> bool:
    """Take out those that are gone already, which may be started again; whether there were any."""
    closed = [index for index, link in links.items() if link.is_closed()]
    for index in closed:
        links.pop(index).close()
    return bool(closed)


class _Guests:
    """Connections that have yet to greet, each in a thread, so that a slow one holds up nobody."""

    def __init__(self):
        self.strangers = 0
        """Connections whose greeting was nonsense, or did not come."""
        self._places = threading.Semaphore(_MOST_GUESTS)
        self._greeted: queue.SimpleQueue[tuple[Link, _Greeting | None]] = queue.SimpleQueue()

    def let_in(self, server: socket.socket) -> None:
        """Wait a moment for a connection, and let it greet."""
        server.settimeout(_SECONDS_BETWEEN_LOOKS)
        try:
            connection = server.accept()[0]
        except OSError:
            return
        if self._places.acquire(blocking=False):
            threading.Thread(target=self._hear, args=(connection,), name="greeting", daemon=True).start()
        else:
            connection.close()
            self.strangers += 1

    def greeted(self) -> Iterator[tuple[Link, _Greeting]]:
        """Those that have greeted as processes do."""
        while not self._greeted.empty():
            link, greeting = self._greeted.get()
            if greeting is None:
                link.close()
                self.strangers += 1
            else:
                yield link, greeting

    def _hear(self, connection: socket.socket) -> None:
        with self._places:
            link = Link(connection)
            self._greeted.put((link, _greeting(link.receive(_SECONDS_TO_GREET))))


def _missing(count: int, links: dict[int, Link], strangers: int, patience: float) -> str:
    missing = ", ".join(str(other) for other in range(1, count) if other not in links)
    others = f" ({strangers} connections were of no process of this run)" if strangers else ""
    return (
        f"{len(links) + 1} of {count} processes came within {patience:g} s, missing: {missing}{others}; "
        "see what they print, or correct --processes.count"
    )


def report(address: tuple[str, int], count: int, index: int, patience: float) -> dict[int, Link]:
    """In another process: its connection to process 0, once all have come."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            link = Link(socket.create_connection(address, timeout=max(0.01, deadline - time.monotonic())))
        except OSError:  # it is not there yet, or its name is not known yet
            time.sleep(_SECONDS_BETWEEN_TRIES)
            continue
        link.send(greeting=_GREETING, **_Greeting(index, count, own_name())._asdict())
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


def interface_of(address: tuple[str, int]) -> str:
    """The address of this machine that the others are told to connect to; "": any that it has."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)]
    except OSError:
        return ""
    # Debian gives a machine's own name a loopback address, which the others cannot reach.
    is_loopback = any(ipaddress.ip_address(host.partition("%")[0]).is_loopback for host in found)
    if is_loopback and address[0] != "localhost" and address[0] not in found:
        return ""
    for host in found:
        with contextlib.suppress(OSError), _listening(host, 0):
            return host
    return ""  # it is of a router that passes on to this machine


def _listening(interface: str, port: int) -> socket.socket:
    if not interface and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    family = socket.AF_INET6 if ":" in interface else socket.AF_INET
    return socket.create_server((interface, port), family=family, backlog=1024)


def _disagreement(greeting: _Greeting, count: int, links: dict[int, Link]) -> str | None:
    """What is contradictory in what a process was told; None: nothing."""
    index, told, name = greeting
    if told != count:
        return (
            f"process {index} ({name}) was told of {told} processes, process 0 of {count}; "
            "give all the same --processes.count"
        )
    if index == 0 or (index in links and not links[index].is_closed()):
        return f"two processes have the index {index}; give each its own --processes.index"
    return None


def own_name() -> str:
    """What others call this process."""
    return f"{socket.gethostname()}, pid {os.getpid()}"

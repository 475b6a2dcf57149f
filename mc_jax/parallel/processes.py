"""Several processes that train one model: how they find each other, and agree.

Each runs the same command and holds the devices of its machine. The runs folder must be on a file system that
all see; process 0 alone writes to it, but for checkpoints, of which each writes what its devices hold.
"""

import contextlib
import ctypes
import hashlib
import math
import re
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from mc_jax import stop_signals
from mc_jax.parallel.roll_call import RollCall

_LONGEST_MESSAGE = 4096  # bytes
_LONGEST_REASON = 500  # characters
_STATUS = re.compile(r"\b[A-Z]{2,}(_[A-Z]+)*: ")  # in errors that are XLA's, whatever their type
# All come to the end together, or within the time to fail together: who waits longer waits in vain.
_SECONDS_TO_SHUT_DOWN = 20


class _Place(NamedTuple):
    """A process's place among N."""

    address: str
    """HOST:PORT of process 0."""
    count: int
    index: int
    is_detected: bool


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    patience: float = 300.0,
) -> Iterator[None]:
    """Be one of the processes of a run; to be entered before JAX looks for devices.

    Without arguments the environment tells: TPU pods, Slurm, Open MPI, Kubernetes (JobSets too), as JAX finds
    them. Where nothing tells of several processes, nothing happens. Left orderly, it waits for all others. If
    one fails or is gone, the others end at once with a message that names it, and exit code 1.

    Args:
      coordinator: HOST:PORT of process 0, with a port that is free there.
      count: N, the number of processes; 1 keeps this one alone, whatever the environment says.
      index: of this one, from 0.
      patience: seconds within which all must have come.

    Raises:
      ValueError: contradictory arguments, or processes that do not come.
    """
    place = _place(coordinator, count, index, patience)
    if place is None:
        yield
        return
    roll_call = RollCall(
        _host_and_port(place.address),
        place.count,
        place.index,
        patience=patience,
        # JAX's service ends all others with the first one that leaves, unless they part together.
        part=jax.distributed.shutdown,
    )
    # The names are known by now, so what JAX looks for itself are this process's devices.
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        cluster_detection_method=None if place.is_detected else "deactivate",
        initialization_timeout=math.ceil(patience),
        shutdown_timeout_seconds=_SECONDS_TO_SHUT_DOWN,
        coordinator_bind_address=_bind_address(roll_call.interface, place.address),
    )
    _let_aborts_wait()
    try:
        with _signals_shared(roll_call):
            yield
            roll_call.leave()
    except BaseException as error:
        if _may_be_of_another(error):
            roll_call.wait_for_bad_news()
        roll_call.fail(" ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON])
        raise
    jax.distributed.shutdown()


def _may_be_of_another(error: BaseException) -> bool:
    """Whether it may come out of a collective, or a barrier of Orbax's, that another process has left."""
    is_ours = isinstance(error, (ValueError, OSError, FloatingPointError))
    return not is_ours or isinstance(error, TimeoutError) or _STATUS.search(str(error)) is not None


@contextlib.contextmanager
def _signals_shared(roll_call: RollCall) -> Iterator[None]:
    """Let a signal to one process be heard by all, and by JAX, whose processes agree on a step to stop at."""
    signals = stop_signals.current()

    def pass_on(number: signal.Signals) -> None:
        # JAX listens to SIGTERM, which is blocked in all threads, so that it comes to this one alone.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        signal.raise_signal(signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        roll_call.pass_on(number)

    def end_all() -> None:
        assert signals.heard is not None
        roll_call.end_all(signals.heard)

    signals.finish_first()
    signals.pass_on = pass_on
    signals.tidy = end_all if jax.process_index() == 0 else None
    try:
        yield
    finally:
        signals.pass_on = signals.tidy = None


def _let_aborts_wait() -> None:
    """Give the roll call time to tell who is gone before JAX's client aborts this process for it.

    Process 0 has JAX's service. When it dies the client of another process prints a stack trace and aborts,
    0.1 s later, while the roll call may still wait for Python's lock. A thread that aborts sleeps first: the
    handler is C's `sleep`, and the seconds are the number that handlers are called with, SIGABRT's.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _bind_address(interface: str, address: str) -> str | None:
    """The address that JAX's service listens at in process 0: that of the roll call."""
    if not interface:
        return None
    host = f"[{interface}]" if ":" in interface else interface
    return f"{host}:{_host_and_port(address)[1]}"


def first_says(value: bool) -> bool:
    """What process 0 has, in all."""
    if jax.process_count() == 1:
        return value
    return _from_first(b"yes" if value else b"") == b"yes"


def first_decides(decide: Callable[[], None]) -> None:
    """Let process 0 do something that all others wait for.

    Raises:
      ValueError: in all processes, if process 0 raises it or an OSError.
    """
    error = None
    if jax.process_index() == 0:
        try:
            decide()
        except (ValueError, OSError) as raised:
            error = raised
    if jax.process_count() > 1:
        told = _from_first(str(error or "").encode())
        if told and error is None:
            raise ValueError(told.decode(errors="replace"))
    if error is not None:
        raise error


def must_agree(what: str, value: str) -> None:
    """See that all processes have the same text.

    Raises:
      ValueError: in all processes, if one has another text than process 0.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    others = [str(index) for index, other in enumerate(digests) if not np.array_equal(other, digests[0])]
    if others:
        raise ValueError(
            f"process {', '.join(others)} has other {what} than process 0; start all with the same command"
        )


def told_by_first(text: str) -> str:
    """Process 0's text, in all of them."""
    return text if jax.process_count() == 1 else _from_first(text.encode()).decode(errors="replace")


def first_of_all(text: str) -> str:
    """The first text that is not empty, in the order of the processes; the same in all."""
    if jax.process_count() == 1:
        return text
    texts = np.asarray(multihost_utils.process_allgather(_padded(text.encode())), np.uint8)
    return next((told for row in texts if (told := row.tobytes().rstrip(b"\0").decode(errors="replace"))), "")


def _from_first(text: bytes) -> bytes:
    """A text of process 0, in all."""
    return np.asarray(multihost_utils.broadcast_one_to_all(_padded(text)), np.uint8).tobytes().rstrip(b"\0")


def _padded(text: bytes) -> np.ndarray:
    text = text[:_LONGEST_MESSAGE]
    padded = np.zeros(_LONGEST_MESSAGE, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return padded


def _place(coordinator: str | None, count: int | None, index: int | None, patience: float) -> _Place | None:
    """The place of this process among those of the run; None if it is alone."""
    given = {"coordinator": coordinator, "count": count, "index": index}
    missing = [f"--processes.{name}" for name, value in given.items() if value is None]
    if count == 1 and (index or 0) == 0:
        return None
    if coordinator is not None and count is not None and index is not None:
        if not 0 <= index < count:
            raise ValueError(f"--processes.index {index} is none of 0 to --processes.count {count} - 1")
        _host_and_port(coordinator)
        return _Place(coordinator, count, index, is_detected=False)
    if len(missing) < len(given):
        raise ValueError(f"{' and '.join(missing)} is missing: the three tell together who is who")
    return _detect(patience)


def _detect(patience: float) -> _Place | None:
    # What jax.distributed.initialize does itself, but it is an error there to be alone.
    from jax._src.clusters import ClusterEnv

    address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, math.ceil(patience)
    )
    if address is None or count is None or index is None or count == 1:
        return None
    return _Place(address, count, index, is_detected=True)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--processes.coordinator {address!r} is no HOST:PORT, for example 10.0.0.1:8476")
    return host.strip("[]"), int(port)

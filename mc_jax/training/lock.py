"""The lock on a run's folder: one training at a time writes to it, wherever its processes run.

A file names who holds it: host, process, since when, and when that was last confirmed, every ten seconds.
Where the file system has locks (flock), the kernel knows at once whether a holder on this machine is alive.
Elsewhere, and for a holder on another host, what counts is whether the file changes while one watches: no
clocks are compared.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from typing import Any, Self

from etils import epath

from mc_jax.data.files import is_in_bucket, make_folder, named

LOCK_FILE = "run.lock"
_SECONDS_BETWEEN_BEATS = 10.0
_SECONDS_TO_DIE = 35.0  # three beats missed
_SECONDS_TO_COLLIDE = 2.0  # two that start at once without flock: the last one to write has it


class RunLock:
    """Holds the lock on a run's folder, which is made where it is missing; a context manager.

    Args:
      run_dir: the run's folder.
      between_beats: seconds after which the holder confirms that it is alive.
      to_die: seconds without that after which a holder that cannot be asked counts as dead.

    Raises:
      ValueError: another process holds it; one line names it.
    """

    def __init__(
        self,
        run_dir: epath.Path,
        *,
        between_beats: float = _SECONDS_BETWEEN_BEATS,
        to_die: float = _SECONDS_TO_DIE,
    ):
        self._run_dir, self._path = run_dir, run_dir / LOCK_FILE
        self._between_beats, self._to_die = between_beats, to_die
        self._record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": _now(),
            "nonce": uuid.uuid4().hex,
        }
        self._written = 0
        self._opened: int | None = None
        self._has_flock = False
        self._made: list[epath.Path] = []
        self._is_lost = False
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def __enter__(self) -> Self:
        self._made = make_folder(self._run_dir)
        try:
            self._open()
            while not self._is_free():
                self._open()
            self._write()
            if not self._has_flock:
                time.sleep(min(_SECONDS_TO_COLLIDE, self._between_beats))
                if not self._holds(holder := self._read()):
                    raise self._refusal(holder)
        except BaseException:
            self._close()
            raise
        self._beats.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._beats.join()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self._path.unlink()
        self._close()

    def check(self) -> None:
        """See that the folder is there, and that nobody took it over, as when this machine slept.

        Raises:
          ValueError: it is not, or somebody did.
        """
        if self._is_lost or (self._opened is not None and not self._is_same_file()):
            holder = self._read()
            if holder and not self._holds(holder):
                raise self._refusal(holder)
            raise ValueError(
                f"{self._run_dir} was deleted or moved while it trained; what was not saved before is lost"
            )

    def _open(self) -> None:
        """Open the file, where there are files, and lock it."""
        if is_in_bucket(self._path):
            return
        if self._opened is not None:
            os.close(self._opened)
        self._opened = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._has_flock = True
        except BlockingIOError:
            raise self._refusal(self._read()) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK):
                raise

    def _is_free(self) -> bool:
        """Wait until whoever the file names is dead; False: it ended and took the file with it."""
        seen = self._read()
        if seen and not (self._has_flock and seen.get("host") == self._record["host"]):
            print(
                f"{_who(seen)} had {self._run_dir} last: seeing for {self._to_die:.0f} s whether it is alive",
                flush=True,
            )
            deadline = time.monotonic() + self._to_die
            while time.monotonic() < deadline and (now := self._read()) is not None:
                if now and now != seen:
                    raise self._refusal(now)
                time.sleep(self._between_beats / 4)
        return self._opened is None or self._is_same_file()

    def _beat(self) -> None:
        while not self._ended.wait(self._between_beats):
            # A full disk the training itself will tell of, a bucket may answer the next time.
            with contextlib.suppress(Exception):
                self._is_lost = not self._is_ours()
                if self._is_lost:
                    return
                self._write()

    def _is_ours(self) -> bool:
        if self._opened is not None and not self._is_same_file():
            return False
        return self._holds(self._read())

    def _is_same_file(self) -> bool:
        assert self._opened is not None
        try:
            return os.path.samestat(os.fstat(self._opened), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _read(self) -> dict[str, Any] | None:
        """What the file says of its holder; {} where it is just being written, None without a file."""
        try:
            return dict(json.loads(self._path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return {}

    def _holds(self, record: dict[str, Any] | None) -> bool:
        return record is not None and record.get("nonce") == self._record["nonce"]

    def _write(self) -> None:
        self._written += 1
        text = json.dumps(self._record | {"refreshed": _now(), "beats": f"{self._written:09}"}) + "\n"
        if self._opened is None:
            self._path.write_text(text)
            return
        # In place, for the lock is the file's; of one length after the first time.
        with named(self._path):
            os.pwrite(self._opened, text.encode(), 0)
            os.ftruncate(self._opened, len(text.encode()))
            os.fsync(self._opened)

    def _close(self) -> None:
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None
        for folder in self._made:  # deepest first; those that hold something stay
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def _refusal(self, holder: dict[str, Any] | None) -> ValueError:
        return ValueError(
            f"{_who(holder)} trains {self._run_dir}; wait until it ends, or choose another --name"
        )


def _who(holder: dict[str, Any] | None) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

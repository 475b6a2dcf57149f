"""What differs where a run's folder is in a bucket: its path, and files that grow.

An object of a bucket is written whole. gcsfs, which is behind `epath` there, takes the mode "a" for "w", with
a warning, and shows nothing of a file before it is closed.
"""

import contextlib
import io
import math
import os
import time

from etils import epath

from mc_jax.data.files import is_in_bucket, named, sync

_SECONDS_BETWEEN_WRITES = 30.0


def absolute(path: epath.Path) -> epath.Path:
    """The path from the root; that of a bucket, which `resolve` takes for a folder named "gs:", as it is."""
    return path if is_in_bucket(path) else path.resolve()


class GrowingFile:
    """Text that is appended to a file: at once on a disk, every half a minute in a bucket.

    Args:
      path: the file; what it holds stays.
      seconds: between two writes to a bucket.
    """

    def __init__(self, path: epath.Path, *, seconds: float = _SECONDS_BETWEEN_WRITES):
        self._path = path
        self._seconds = seconds
        self._file: io.FileIO | None = None
        self._parts: list[str] = []
        self._written = 0
        self._clock = -math.inf  # the first text is shown at once
        if not is_in_bucket(path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
            sync(path.parent)  # else a power cut takes its name
        elif path.exists():
            self._parts.append(path.read_text())
            self._written = 1

    def write(self, text: str) -> None:
        """Append text; on a full disk none of it, so that what is there stays whole."""
        if self._file is not None:
            data, length = text.encode(), os.fstat(self._file.fileno()).st_size
            try:
                with named(self._path):
                    while data:
                        data = data[self._file.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(length)
                raise
            return
        self._parts.append(text)
        if time.monotonic() - self._clock >= self._seconds:
            self._write_whole()

    def sync(self) -> None:
        """Flush what was written to the disk."""
        if self._file is not None:
            with named(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left."""
        if self._file is not None:
            self.sync()
            self._file.close()
        else:
            self._write_whole()

    def _write_whole(self) -> None:
        if len(self._parts) > self._written:
            self._path.write_text("".join(self._parts))
            self._written = len(self._parts)
        self._clock = time.monotonic()

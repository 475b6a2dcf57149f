"""What differs where a run's folder is in a bucket: its path, and files that grow.

An object of a bucket is written whole. gcsfs, which is behind `epath` there, takes the mode "a" for "w", with
a warning, and shows nothing of a file before it is closed.
"""

import math
import os
import time
from typing import IO

from etils import epath

_SECONDS_BETWEEN_WRITES = 30.0


def is_in_bucket(path: epath.Path) -> bool:
    """Whether the path is one of a bucket, such as gs://bucket/runs."""
    return "://" in os.fspath(path)


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
        self._file: IO[str] | None = None
        self._parts: list[str] = []
        self._written = 0
        self._clock = -math.inf  # the first text is shown at once
        if not is_in_bucket(path):
            self._file = path.open("a")
        elif path.exists():
            self._parts.append(path.read_text())
            self._written = 1

    def write(self, text: str) -> None:
        """Append text."""
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
            return
        self._parts.append(text)
        if time.monotonic() - self._clock >= self._seconds:
            self._write_whole()

    def close(self) -> None:
        """Write what is left."""
        if self._file is not None:
            self._file.close()
        else:
            self._write_whole()

    def _write_whole(self) -> None:
        if len(self._parts) > self._written:
            self._path.write_text("".join(self._parts))
            self._written = len(self._parts)
        self._clock = time.monotonic()

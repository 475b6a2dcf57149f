"""Who measures which cells: a locked file for each group, which the kernel frees when its holder dies."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Generator
from pathlib import Path

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK)


@contextlib.contextmanager
def claimed(path: Path) -> Generator[bool]:
    """Whether this process, and no other, has the claim of this name, until the block ends.

    On a file system without locks it always has: work may then be done twice, with one result.
    """
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
        yield True
        # Who has opened it meanwhile locks a file without a name, and finds that the work is done.
        path.unlink(missing_ok=True)
    finally:
        os.close(opened)

"""Writing that outlasts a power cut: a file counts once its bytes and its name are on the disk."""

import contextlib
import errno
import os

from etils import epath

from mc_jax.training._buckets import is_in_bucket


def flush(path: epath.Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk; a bucket's objects always are."""
    if is_in_bucket(path):
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some file systems cannot, such as a few of FUSE.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def write_durably(path: epath.Path, text: str) -> None:
    """Write a text file that is there whole or not at all, whatever is cut off."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        flush(part)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    flush(path.parent)

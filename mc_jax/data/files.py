"""Files and folders that are whole or not there, after a power cut too; JSON whose errors name the file.

A rename is atomic, but a file system may write the new name to disk before the content: what counts is
flushed (fsync) first, and its folder after. An object of a bucket is written whole, and has no folder.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import uuid
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from etils import epath

UNFINISHED = (".part", ".partial")
"""How the names end of what was never finished; nobody reads it."""
_unfinished: set[Path] = set()


def is_in_bucket(path: epath.PathLike) -> bool:
    """Whether the path is one of a bucket, such as gs://bucket/runs."""
    return "://" in os.fspath(path)


def write_text(path: epath.PathLike, text: str) -> None:
    """Write a file whole or not at all: a kill or a power cut leaves the old one or the new one."""
    path = epath.Path(path)
    if is_in_bucket(path):
        path.write_text(text)
        return
    part = path.with_name(path.name + UNFINISHED[0])
    try:
        with named(path):
            part.write_text(text)
            sync(part)
            part.replace(path)
    except OSError:  # a full disk: what is there of the new one is in the way
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: epath.PathLike, values: Any, indent: int | None = 2) -> None:
    """Write `values` as a JSON file, whole or not at all; its folder is made where it is missing."""
    make_folder(epath.Path(path).parent)
    write_text(path, json_text(values, indent) + "\n")


def json_text(values: Any, indent: int | None = None) -> str:
    """Values as JSON, which has no NaN and no infinity: a number that is not finite is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(content) for name, content in value.items()}
        if isinstance(value, list | tuple):
            return [finite(content) for content in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(values), indent=indent, allow_nan=False)


def make_folder(path: epath.PathLike) -> list[epath.Path]:
    """Make a folder and those above it, and return the ones that were missing, deepest first."""
    path = epath.Path(path)
    made: list[epath.Path] = []
    if is_in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)
        return made
    above = path
    while not above.exists():
        made.append(above)
        above = above.parent
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        sync(folder.parent)
    return made


def sync(path: epath.PathLike) -> None:
    """Flush a file's content, or a folder's names, to the disk; nothing where the path is in a bucket."""
    if is_in_bucket(path):
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # such as folders of some network file systems
            raise
    finally:
        os.close(opened)


@contextlib.contextmanager
def named(path: epath.PathLike) -> Generator[None]:
    """Let an error of the file system name the file, as those of writing and flushing do not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


@contextlib.contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """Yield an empty folder beside `path`, which takes that name at the end.

    On an error (or an interrupt) it is removed, so `path` is never half-made. What a kill leaves is removed
    here by the next one that makes `path`; a lock on it tells that nobody writes to it any more.
    """
    make_folder(path.parent)
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.name}.") and left.suffix == UNFINISHED[1]:
            with contextlib.suppress(OSError), _locked(left):
                shutil.rmtree(left)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{UNFINISHED[1]}")
    _unfinished.add(partial)
    partial.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(named(path))
            with contextlib.suppress(OSError):  # a file system without locks: then nobody removes it
                stack.enter_context(_locked(partial))
            yield partial
            for folder, _, files in os.walk(partial):
                for name in files:
                    sync(os.path.join(folder, name))
                sync(folder)
            os.replace(partial, path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unfinished.discard(partial)


def remove_unfinished() -> None:
    """Remove what another thread has written of new folders, before the program ends at once."""
    for partial in list(_unfinished):
        # Renamed first: the other thread finds it no more, and puts nothing into it meanwhile.
        gone = partial.with_name(f"{partial.stem}.gone{UNFINISHED[1]}")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(partial.replace(gone))


@contextlib.contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Hold a lock on a folder; OSError where another holds it, or there are none."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(opened)


def read_json(
    path: epath.PathLike, *, kind: str, version: int | tuple[int, ...], fields: Iterable[str], cure: str
) -> dict[str, Any]:
    """Read a JSON object that says it is of this `kind` and `version`, or one of these, and has all `fields`.

    Raises:
      ValueError: the file is missing, damaged, or of another kind or version; one line with `cure`.
    """
    try:
        values = json.loads(epath.Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {kind} at {path}; {cure}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable {kind} ({error}); {cure}") from None
    if not isinstance(values, dict) or values.get("kind") != kind:
        raise ValueError(f"{path} is not a {kind} of mc_jax; {cure}")
    versions = version if isinstance(version, tuple) else (version,)
    if values.get("version") not in versions:
        raise ValueError(
            f"{path} is a {kind} of version {values.get('version')}, this mc_jax reads "
            f"{' and '.join(map(str, versions))}; {cure}"
        )
    if missing := [field for field in fields if field not in values]:
        raise ValueError(f"{path} is damaged: it has no {', '.join(missing)}; {cure}")
    return values

"""Files that are either whole or not there, and JSON read with errors that name the file."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from etils import epath


@contextlib.contextmanager
def whole_or_nothing(path: Path) -> Generator[Path]:
    """Yield a name beside `path` to write a file or folder under; it takes the name `path` at the end.

    On an error (or an interrupt) what was written is removed, so `path` is never half-made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def write_json(path: epath.PathLike, values: dict[str, Any], indent: int | None = 2) -> None:
    """Write `values` as a JSON file, whole or not at all; `path` may be in a bucket."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(json.dumps(values, indent=indent) + "\n")
    partial.replace(path)


def read_json(
    path: epath.PathLike, *, kind: str, version: int, fields: Iterable[str], cure: str
) -> dict[str, Any]:
    """Read a JSON object that says it is of this `kind` and `version` and has all `fields`.

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
    if values.get("version") != version:
        raise ValueError(
            f"{path} is a {kind} of version {values.get('version')}, this mc_jax reads {version}; {cure}"
        )
    if missing := [field for field in fields if field not in values]:
        raise ValueError(f"{path} is damaged: it has no {', '.join(missing)}; {cure}")
    return values

"""The digest of a checkpoint: size and SHA-256 of every file, and facts of its step.

Each of P processes writes `digest.INDEX.json` into the step's folder, of the files that it wrote; the digest
has a hash of its own. SHA-256, since any tool checks it by hand, and processors have instructions for it.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath

from mc_jax.data.files import sync, write_text

_DIGEST_NAME = re.compile(r"digest\.\d+\.json(\.part)?")
_PROCESS_NAME = re.compile(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)")
_BLOCK = 1 << 22
_THREADS = 8


class DamagedError(ValueError):
    """A checkpoint that is not what was saved; the message says what of it."""


class FileHash(NamedTuple):
    """What a file held when it was saved."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Digest:
    """What one process saved of a step."""

    step: int
    process: int
    processes: int
    """P, the processes that saved the step."""
    files: Mapping[str, FileHash]
    """The files' hashes, by path from the step's folder."""
    loss: float
    """The training loss of the step."""
    seal: Mapping[str, str] | None
    """What the run was made of, as the caller tells it."""


def digest_file(step_folder: epath.Path, process: int) -> epath.Path:
    """The file of a process's digest of a step."""
    return step_folder / f"digest.{process}.json"


def hash_own_files(step_folder: epath.Path, process: int, processes: int) -> dict[str, FileHash]:
    """Hashes of the files that this process wrote, each on the disk by then, as are the names of all."""
    files, folders = walk(step_folder)
    own = [name for name in files if _writer(name, processes) == process]

    def flush_and_hash(name: str) -> FileHash:
        sync(step_folder / name)
        return _hash(step_folder / name)

    with ThreadPoolExecutor(_THREADS) as threads:
        hashes = dict(zip(own, threads.map(flush_and_hash, own), strict=True))
    for folder in (*reversed(folders), step_folder.parent):
        sync(folder)
    return hashes


def write_digest(step_folder: epath.Path, digest: Digest) -> None:
    """Write a digest; when all processes have, the step counts."""
    text = _canonical(dataclasses.asdict(digest))
    whole = {"digest": json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_text(digest_file(step_folder, digest.process), json.dumps(whole, indent=1))


def read_digest(step_folder: epath.Path, process: int = 0) -> Digest:
    """The digest that a process wrote.

    Raises:
      DamagedError: it is not what was written.
      FileNotFoundError: there is none.
    """
    path = digest_file(step_folder, process)
    try:
        whole = json.loads(path.read_text())
        values: dict[str, Any] = whole["digest"]
        if hashlib.sha256(_canonical(values).encode()).hexdigest() != whole["sha256"]:
            raise DamagedError(f"{path.name} is not what was written")
        files = {name: FileHash(*value) for name, value in values.pop("files").items()}
        return Digest(files=files, **values)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path.name} cannot be read") from error


def read_digests(step_folder: epath.Path) -> list[Digest]:
    """The digests of all processes.

    Raises:
      DamagedError: one is not what was written.
      FileNotFoundError: one is missing, or not yet written.
    """
    first = read_digest(step_folder)
    return [first, *(read_digest(step_folder, process) for process in range(1, first.processes))]


def hash_of_digests(step_folder: epath.Path) -> str | None:
    """SHA-256 of a checkpoint's digests, and so of all its files; None: an old one has no digests."""
    files = sorted(step_folder.glob("digest.*.json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else None


def verify(step_folder: epath.Path, digests: list[Digest], *, share: int = 0, shares: int = 1) -> None:
    """See that the files of a step are what was saved; or a share of them, where several processes look.

    Raises:
      DamagedError: the first file that is not.
    """
    files = [item for digest in digests for item in sorted(digest.files.items())][share::shares]

    def problem(item: tuple[str, FileHash]) -> str | None:
        name, saved = item
        try:
            size = (step_folder / name).stat().length
            if size != saved.size:
                return f"{name} has {size:,} bytes of {saved.size:,}"
            return None if _hash(step_folder / name) == saved else f"{name} holds other bytes than were saved"
        except FileNotFoundError:
            return f"{name} is gone"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    with ThreadPoolExecutor(_THREADS) as threads:
        found = next(filter(None, threads.map(problem, files)), None)
    if found:
        raise DamagedError(found)


def _hash(path: epath.Path) -> FileHash:
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            size += len(block)
    return FileHash(size, sha256.hexdigest())


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _writer(name: str, processes: int) -> int:
    """The process that wrote a file: Orbax names some by it, and the first one writes the rest."""
    found = _PROCESS_NAME.search(name)
    return int(found[1]) if found and int(found[1]) < processes else 0


def walk(folder: epath.Path) -> tuple[list[str], list[epath.Path]]:
    """The files of a folder, as paths from it, without digests; and its folders, itself first."""
    files, folders, left = [], [], [(folder, "")]
    while left:
        inner, prefix = left.pop()
        folders.append(inner)
        for path in sorted(inner.iterdir()):
            if path.is_dir():
                left.append((path, f"{prefix}{path.name}/"))
            elif prefix or not _DIGEST_NAME.fullmatch(path.name):
                files.append(prefix + path.name)
    return files, folders

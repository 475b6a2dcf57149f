"""Sources of text: files, folders, patterns and standard input, plain or compressed."""

import bz2
import contextlib
import dataclasses
import glob
import gzip
import importlib
import importlib.util
import io
import lzma
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, cast

type Kind = Literal["text", "lines", "values", "table"]
"""One document, one a line, one a value of JSON, one a row."""

_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "values",
    ".parquet": "table",
}
_PACKINGS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = f"{', '.join(_KINDS)}, each but the last also with {', '.join(_PACKINGS)}"
"""What the names of files may end in, for people."""
STANDARD_INPUT = "-"
_BUFFER_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A file that is read as a stream, as often as one likes."""

    name: str
    """What its documents are called by: the file's name, from the folder on that was given."""
    place: str
    """Its path, for messages."""
    kind: Kind
    """What a document is."""
    packing: str = ""
    """How it is compressed: "", or an ending such as ".gz"."""
    kept: BinaryIO | None = None
    """A copy on the disk of what can be read only once; None: the file itself is read."""

    @property
    def size(self) -> int:
        """Bytes on the disk; 0 where there is nothing any more."""
        with contextlib.suppress(OSError):
            return os.stat(self.place if self.kept is None else self.kept.fileno()).st_size
        return 0

    @contextlib.contextmanager
    def open(self) -> Generator[BinaryIO]:
        """The content, unpacked, from its beginning.

        Raises:
          OSError: there is no such file any more, or it may not be read.
        """
        with contextlib.ExitStack() as stack:
            if self.kept is None:
                raw: BinaryIO = stack.enter_context(open(self.place, "rb"))
            else:  # a descriptor of its own, which is closed with what unpacks it
                raw = stack.enter_context(os.fdopen(os.dup(self.kept.fileno()), "rb"))
                raw.seek(0)
            yield stack.enter_context(_unpacked(raw, self.packing)) if self.packing else raw


def find_sources(
    inputs: Sequence[str | Path], *, format: str | None = None, without: Collection[Source] = ()
) -> list[Source]:
    """The files that inputs name, in a fixed order, each seen to be there and of a known format.

    Args:
      inputs: files, whose endings may be in any case of letters; folders, of which all files of a known
        format are taken, but hidden ones; patterns such as "books/**/*.txt"; "-" for standard input, or a
        pipe, which are copied to the disk.
      format: what all are read as, such as "jsonl" or "txt.gz", whatever they are called; None: by their
        names, standard input and pipes as text.
      without: files that a folder or pattern does not stand for, since they are given elsewhere.

    Raises:
      ValueError: there is no such file, it is of no known format, it is given twice, or a library that reads
        it is not installed.
    """
    ending = None if format is None else "." + format.lower().lstrip(".")
    if ending is not None and _parse(ending) is None:
        raise ValueError(f"there is no format {format!r}; known are {FORMATS}")
    elsewhere = {os.path.realpath(source.place) for source in without}
    sources: list[Source] = []
    for given in [str(path) for path in inputs]:
        path = Path(given).expanduser()
        if given == STANDARD_INPUT:
            sources.append(_copied(given, sys.stdin.buffer, ending))
        elif path.is_file():
            sources.append(_source(path, path.name, ending))
        elif path.exists() and not path.is_dir():
            with path.open("rb") as pipe:
                sources.append(_copied(given, pipe, ending))
        else:
            found = _found(path, given)
            known = [(file, name) for file, name in found if ending is not None or _parse(file.name)]
            if not known:
                raise ValueError(f"there is no file of a known format in {given} ({FORMATS}); check the path")
            sources += [
                _source(file, name, ending) for file, name in known if os.path.realpath(file) not in elsewhere
            ]
    return sources


def must_differ(sources: Sequence[Source]) -> None:
    """See that no file is given twice.

    Raises:
      ValueError: one is.
    """
    seen: set[str] = set()
    for source in sources:
        path = source.place if source.kept is not None else os.path.realpath(source.place)
        if path in seen:
            raise ValueError(
                f"{source.place} is given twice; give each file once, for training or for held_out, "
                "or the result is measured on text that was trained on"
            )
        seen.add(path)


def has_fields(path: Path) -> bool:
    """Whether documents of a file have fields, by its name: all but those of .txt and .md."""
    parsed = _parse(path.name)
    return parsed is None or parsed[0] != "text"


def _found(path: Path, given: str) -> list[tuple[Path, str]]:
    """The files of a folder or pattern, hidden ones left out, and their names from there on."""
    if path.is_dir():
        files = []
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            files += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        return [(file, file.relative_to(path).as_posix()) for file in files if file.is_file()]
    if not glob.has_magic(given):
        raise ValueError(f"there is no file {path}; check the path")
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
    return [(match, match.name) for match in matches if match.is_file()]


def _parse(name: str) -> tuple[Kind, str] | None:
    """What a file of this name holds and how it is packed; None: it is of no known format."""
    stem, packing = os.path.splitext(name.lower())
    if packing in _PACKINGS:
        ending = os.path.splitext("_" + stem)[1]
    else:
        ending, packing = os.path.splitext("_" + name.lower())[1], ""
    kind = _KINDS.get(ending)
    return None if kind is None else (kind, packing)


def _source(path: Path, name: str, ending: str | None, kept: BinaryIO | None = None) -> Source:
    place = name if kept is not None else str(path)
    parsed = _parse(ending or path.name)
    if parsed is None:
        raise ValueError(f"{path} is of no known format; give a file that ends in {FORMATS}, or its --format")
    kind, packing = parsed
    if kind == "table" and packing:
        raise ValueError(f"{place} is packed twice, for .parquet packs what is in it; unpack it first")
    if (kind == "table" or packing == ".zst") and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"pyarrow, which reads {place}, is not installed: scripts/setup hf, or pip install pyarrow"
        )
    return Source(name=name, place=place, kind=kind, packing=packing, kept=kept)


def _copied(given: str, stream: BinaryIO, ending: str | None) -> Source:
    """What can be read once, as a file that is gone with the program, however that ends."""
    name = "standard input" if given == STANDARD_INPUT else given
    kept = tempfile.TemporaryFile()  # noqa: SIM115
    source = _source(Path(name), name, ending or ".txt", kept=cast(BinaryIO, kept))
    assert source.kept is not None
    shutil.copyfileobj(stream, source.kept, 1 << 20)
    source.kept.flush()
    return source


@contextlib.contextmanager
def _unpacked(raw: BinaryIO, packing: str) -> Generator[BinaryIO]:
    if packing == ".zst":
        # Optional, so imported by name: a type checker need not find it.
        pyarrow = importlib.import_module("pyarrow")
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    else:
        stream = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[packing].open(raw, "rb")
    # Lines of many small reads are quick from a buffer only.
    yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), _BUFFER_BYTES))

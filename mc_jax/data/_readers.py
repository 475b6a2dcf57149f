"""Documents from sources of text, read as streams; what is no document is told, and reading goes on after it.

A document is a text, or a conversation of which the responses alone are scored. At most a line, a value or a
few rows are in memory at a time; a longer text comes in parts (`Document.continues`).
"""

import codecs
import dataclasses
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from mc_jax.data._json_values import json_values
from mc_jax.data._parquet import parquet_rows
from mc_jax.data.conversations import FIELDS, ChatTemplate, conversation
from mc_jax.data.documents import Document
from mc_jax.data.sources import Source
from mc_jax.data.tokenizer import cut_stream, cut_text

_CHUNK_BYTES = 1 << 20
_PART_CHARACTERS = 1 << 20
_LONGEST_LINE = 64 << 20  # bytes; what reads JSON needs all of a line, several times over
_CONVERSATIONS = ("messages", "conversations", "prompt")
_MAGIC = {
    b"\x1f\x8b": "is packed by gzip; let its name end in .gz",
    b"BZh": "is packed by bzip2; let its name end in .bz2",
    b"\xfd7zXZ": "is packed by xz; let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "is packed by zstd; let its name end in .zst",
    codecs.BOM_UTF16_LE: "is UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "is UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How files are read, and which of their documents count."""

    text_field: str = "text"
    """Field of JSON, or column of .parquet, that has the text; "a.b": field b of field a."""
    template: ChatTemplate | None = None
    """What makes a text of the conversation that a line, value or row has, of which the responses alone are
    learned and scored; None: they have texts."""
    format: str | None = None
    """What all files are read as, such as "jsonl" or "txt.gz"; None: by their names."""
    skip_bad: bool = False
    """Whether what cannot be read is counted and left out; else the first such place ends it."""
    drop_duplicates: bool = False
    """Whether a document that is equal to an earlier one is left out; they are counted anyway."""


class Problem(NamedTuple):
    """Why there is no document at a place; what a document had before it belongs to none."""

    why: str
    """In a few words, the same for all of its kind."""
    message: str
    """One line with file, place and cure."""


def read_documents(source: Source, reading: Reading) -> Iterator[Document | Problem]:
    """The documents of a file, and what is none.

    Args:
      source: the file.
      reading: which field has the text, or what makes a text of a conversation.
    """
    read = {"text": _text, "lines": _lines, "values": _values, "table": _rows}[source.kind]
    if source.kind == "text" and reading.template is not None:
        message = f"{source.place} has no prompts and responses; give .jsonl or .parquet with --responses"
        yield Problem("no conversation", message)
        return
    try:
        yield from read(source, reading)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = f"{source.place} cannot be read ({error}); is it whole?"
        yield Problem("damaged or missing file", " ".join(reason.split()))


def read_strictly(sources: Iterable[Source], reading: Reading) -> Iterator[Document]:
    """The documents of all files.

    Raises:
      ValueError: the first problem; one line with file, place and cure.
    """
    for source in sources:
        for item in read_documents(source, reading):
            if isinstance(item, Problem):
                raise ValueError(item.message)
            yield item


def _text(source: Source, reading: Reading) -> Iterator[Document | Problem]:
    with source.open() as file:
        try:
            yield from _in_parts(source.name, cut_stream(_decoded(source, file)))
        except _NotUtf8 as error:
            yield Problem("not UTF-8", str(error))


def _lines(source: Source, reading: Reading) -> Iterator[Document | Problem]:
    with source.open() as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            place = f"{source.place}:{number}"
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(_CHUNK_BYTES)
                message = f"{place} is longer than {_LONGEST_LINE >> 20} MiB; cut it, or give it as .txt"
                yield Problem("too long a line", message)
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode())
            except UnicodeDecodeError as error:
                yield Problem("not UTF-8", f"{place} {_no_utf8(line, number == 1, error)}")
                if number == 1 and line.startswith(tuple(_MAGIC)):
                    return  # there are no lines
            except RecursionError:
                yield Problem("nested too deeply", f"{place} is nested too deeply to be read; remove it")
            except ValueError as error:
                yield Problem("not JSON", f"{place} is not JSON ({error}); write one object a line")
            else:
                yield from _document(values, f"{source.name}:{number}", place, reading)


def _values(source: Source, reading: Reading) -> Iterator[Document | Problem]:
    with source.open() as file:
        try:
            for line, values in json_values(_decoded(source, file), _LONGEST_LINE):
                yield from _document(values, f"{source.name}:{line}", f"{source.place}:{line}", reading)
        except _NotUtf8 as error:
            yield Problem("not UTF-8", str(error))
        except ValueError as error:
            yield Problem("not JSON", f"{source.place}:{error}; write an array of objects")


def _rows(source: Source, reading: Reading) -> Iterator[Document | Problem]:
    wanted = FIELDS if reading.template is not None else (reading.text_field,)
    with source.open() as file:
        try:
            for number, values in enumerate(parquet_rows(file, wanted), 1):
                place = f"row {number} of {source.place}"
                yield from _document(values, f"{source.name}:{number}", place, reading)
        except ValueError as error:  # Arrow's own are of it
            yield Problem("damaged or missing file", f"{source.place} cannot be read ({error}); is it whole?")


def _document(values: Any, name: str, place: str, reading: Reading) -> Iterator[Document | Problem]:
    """What a line, value or row has: a text, in parts if it is long, or a conversation."""
    if reading.template is not None:
        try:
            document = conversation(name, values, reading.template, place=place)
        except ValueError as error:
            yield Problem("no conversation", str(error))
            return
    else:
        text = _field(values, reading.text_field, place)
        if isinstance(text, Problem):
            yield text
            return
        document = Document(name, text)
    try:
        document.text.encode()
    except UnicodeEncodeError:  # JSON may hold half of a surrogate pair
        yield Problem(
            "lone surrogate",
            f"{place} is no valid Unicode; remove lone surrogates from it, or the whole of it",
        )
        return
    if document.responses is None and len(document.text) > _PART_CHARACTERS:
        yield from _in_parts(name, cut_text(document.text))
    else:
        yield document


def _field(values: Any, path: str, place: str) -> str | Problem:
    """The text in a field, which may be a field of a field."""
    found, left = values, path
    while left and isinstance(found, dict):
        name = left if left in found else left.partition(".")[0]
        if name not in found:
            break
        found, left = found[name], left[len(name) + 1 :]
    if not left and isinstance(found, str):
        return found
    begin = f"{place} has no text in field {path!r}"
    cure = "name the field that has it with text_field (--text-field)"
    if isinstance(values, dict) and (known := [name for name in _CONVERSATIONS if name in values]) and left:
        return Problem(
            "a conversation", f"{begin}, but a conversation in {known[0]!r}; add --responses, or {cure}"
        )
    if not left and found is None:
        return Problem("null for a text", f"{begin}, but null; remove it, or leave such out with --skip-bad")
    if not left:
        return Problem("another type than text", f"{begin}, but {_kind(found)}; {cure}")
    has = f"it has: {', '.join(found)}" if isinstance(found, dict) else f"it is {_kind(found)}"
    if len(has) > 300:
        has = f"{has[:300]}..."
    return Problem("no such field", f"{begin} ({has}); {cure}")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", bytes: "bytes"}
    return "null" if value is None else kinds.get(type(value), "a number")


def _in_parts(name: str, pieces: Iterable[str]) -> Iterator[Document]:
    """A document of the pieces of its text, a megabyte at a time."""
    part = io.StringIO()
    for piece in pieces:
        if part.tell() >= _PART_CHARACTERS:
            yield Document(name, part.getvalue(), continues=True)
            part = io.StringIO()
        part.write(piece)
    yield Document(name, part.getvalue())


class _NotUtf8(Exception):
    """A text that is not what it should be; one line with file, place and cure."""


def _decoded(source: Source, file: BinaryIO) -> Iterator[str]:
    """The text of a file in chunks, without a byte-order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read, lines, is_first = 0, 1, True
    while True:
        chunk = file.read(_CHUNK_BYTES)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            data = bytes(error.object)
            byte = read + len(chunk) - len(data) + error.start
            line = lines + data[: error.start].count(b"\n")
            message = _no_utf8(chunk, read == 0, error, f" at byte {byte}, line {line}")
            raise _NotUtf8(f"{source.place} {message}") from None
        if not chunk:
            break
        read += len(chunk)
        lines += chunk.count(b"\n")
        if is_first:
            text, is_first = text.removeprefix("\ufeff"), False
        yield text


def _no_utf8(data: bytes, is_first: bool, error: UnicodeDecodeError, where: str = "") -> str:
    for magic, message in _MAGIC.items():
        if is_first and data.startswith(magic):
            return message
    return f"is not UTF-8 ({error.reason}{where}); convert it"

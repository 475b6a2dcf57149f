"""Documents from text files: .txt, .jsonl (both also with .gz) and .parquet, read as a stream.

A document is a text, or a conversation of which the responses alone are scored.
"""

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mc_jax.data.conversations import FIELDS, ChatTemplate, conversation
from mc_jax.data.documents import Document

FORMATS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet")


def check_readable(path: Path) -> None:
    """See that a file exists, is of a known format, and that the format's library is installed.

    Raises:
      ValueError: it is not so.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give its files, for example {path}/*.txt")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; check the path")
    if not path.name.endswith(FORMATS):
        raise ValueError(f"{path} is of no known format; give a file that ends in {', '.join(FORMATS)}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"pyarrow, which reads {path}, is not installed: scripts/setup hf, or pip install pyarrow"
        )


def read_documents(path: Path, content: str | ChatTemplate) -> Iterator[Document]:
    """The documents of a file: a .txt file is one; of .jsonl and .parquet each line or row is.

    Args:
      path: the file.
      content: field of a .jsonl line or column of a .parquet file that has the text; or what makes a text of
        the conversation that a line or row has.

    Raises:
      ValueError: the file is damaged, not UTF-8, or has no such field; one line with file and place.
    """
    if path.suffix == ".parquet":
        documents = _parquet(path, content)
    elif path.name.endswith((".txt", ".txt.gz")):
        if isinstance(content, ChatTemplate):
            raise ValueError(f"{path} has no prompts and responses; give .jsonl or .parquet with --responses")
        documents = _text(path)
    else:
        documents = _json_lines(path, content)
    try:
        for document in documents:
            try:
                document.text.encode()
            except UnicodeEncodeError:  # JSON may hold half of a surrogate pair
                raise ValueError(
                    f"{document.name} is no valid Unicode; remove lone surrogates from it"
                ) from None
            yield document
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}); is it whole?") from None


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _text(path: Path) -> Iterator[Document]:
    with _open(path) as file:
        yield Document(path.name, file.read().decode())


def _json_lines(path: Path, content: str | ChatTemplate) -> Iterator[Document]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            name = f"{path.name}:{number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error}); write one object a line") from None
            if isinstance(content, ChatTemplate):
                yield conversation(name, values, content, place=f"{path}:{number}")
                continue
            if not isinstance(values, dict) or not isinstance(values.get(content), str):
                fields = ", ".join(values) if isinstance(values, dict) else type(values).__name__
                raise ValueError(
                    f"{path}:{number} has no text in field {content!r} (it has: {fields}); "
                    "name the field that has it with text_field"
                )
            yield Document(name, values[content])


def _parquet(path: Path, content: str | ChatTemplate) -> Iterator[Document]:
    # Optional, so imported by name: a type checker need not find it.
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if isinstance(content, ChatTemplate):
                wanted = [name for name in file.schema_arrow.names if name in FIELDS]
                rows = (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
                for number, values in enumerate(rows, 1):
                    place = f"row {number} of {path}"
                    yield conversation(f"{path.name}:{number}", values, content, place=place)
                return
            if content not in columns:
                raise ValueError(
                    f"{path} has no column {content!r} (it has: {', '.join(columns)}); "
                    "name the column that has the text with text_field"
                )
            row = 0
            for batch in file.iter_batches(columns=[content]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise ValueError(
                            f"row {row} of {path} has no text in column {content!r}; remove the row"
                        )
                    yield Document(f"{path.name}:{row}", text)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read ({error}); is it whole?") from None

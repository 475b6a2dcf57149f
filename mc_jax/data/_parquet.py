"""Rows of .parquet files, some megabytes at a time."""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

_BATCH_BYTES = 4 << 20
_MOST_ROWS = 4096
_BUFFER_BYTES = 1 << 20


def parquet_rows(file: BinaryIO, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file, with some of their columns.

    Args:
      file: opened.
      wanted: columns, of which a file may have some; "a.b": field b of column a.

    Raises:
      ValueError: it is damaged.
    """
    # Optional, so imported by name: a type checker need not find it.
    parquet = importlib.import_module("pyarrow.parquet")
    # Not read ahead: a group of rows may be as large as the file.
    with parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
        names = table.schema_arrow.names
        columns = [name if name in names else name.partition(".")[0] for name in wanted]
        columns = [name for name in columns if name in names]
        if not columns:  # the first row tells which there are
            yield from (dict.fromkeys(names) for _ in range(table.metadata.num_rows))
            return
        sizes = [table.metadata.row_group(group) for group in range(table.metadata.num_row_groups)]
        for group, size in enumerate(sizes):
            bytes_of_row = max(1, size.total_byte_size // max(1, size.num_rows))
            rows = max(1, min(_MOST_ROWS, _BATCH_BYTES // bytes_of_row))
            for batch in table.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                yield from _rows(batch)


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # Arrow takes any bytes for a string
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield dict.fromkeys(batch.schema.names, b"")

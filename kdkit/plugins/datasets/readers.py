"""Rows of local files: ``.jsonl``, ``.jsonl.gz``, ``.json``, ``.parquet``, or a directory of them.

A row that cannot be read is handed on with its problem, so that the caller decides; a file that cannot be read is a
:class:`kdkit.api.DataError`. Memory is bounded by one line, one item of a list or one small batch of a table, also for
compressed files.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, NoReturn

from kdkit.api.errors import DataError, EnvironmentUnmet
from kdkit.plugins.datasets.json_list import list_items
from kdkit.plugins.datasets.values import RowError, SourceRow, clean_row

__all__ = ["MAX_LINE", "SUFFIXES", "parquet_objects", "read_rows", "table_rows"]

SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".json", ".parquet")
MAX_LINE: Final = 10_000_000
"""Longest line of a JSON Lines file, in bytes; an item of a JSON list may have twice as many."""
EXPANSION: Final = 200
EXPANSION_FROM: Final = 64 * 2**20
"""A compressed file may grow to 64 MiB or to 200 times its size, whichever is more; text grows 3 to 20 times."""
_BATCH: Final = 32
_BATCH_BYTES: Final = 32 * 2**20
_PARQUET_BUFFER: Final = 2**20
_BOM: Final = b"\xef\xbb\xbf"


def read_rows(path: Path) -> Iterator[SourceRow]:
    """The rows of a file, or of all data files of a directory (not of its sub-directories) in the order of their names.

    Raises:
        DataError: No such file, nothing in it, an unknown format, or damage beyond single rows.
        EnvironmentUnmet: The operating system refuses to read it.
    """
    try:
        files = _files_of(path) if path.is_dir() else [path]
        for file in files:
            yield from _file_rows(file)
    except OSError as error:
        raise EnvironmentUnmet(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def table_rows(rows: Iterator[Any], source: str) -> Iterator[SourceRow]:
    """Rows of a table; ``source`` names it, rows count from 1. A ``RowError`` among them is a row that is broken."""
    for number, row in enumerate(rows, start=1):
        where = f"{source}:{number}"
        yield SourceRow(where, {}, str(row)) if isinstance(row, RowError) else _checked(where, row, table=True)


def _files_of(directory: Path) -> list[Path]:
    found = sorted(file for file in directory.iterdir() if _format(file) and not file.name.startswith("."))
    if not found:
        raise DataError("no data files in this directory", where=str(directory), allowed=", ".join(SUFFIXES))
    return found


def _format(file: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)


def _file_rows(file: Path) -> Iterator[SourceRow]:
    if not file.exists():
        raise DataError("no such file", where=str(file))
    if not file.is_file():
        raise DataError("is no regular file", where=str(file))
    count = 0
    for count, row in enumerate(_rows_by_format(file), start=1):  # noqa: B007
        yield row
    if not count:
        raise DataError("is empty", where=str(file), hint="name a file with at least one row")


def _rows_by_format(file: Path) -> Iterator[SourceRow]:
    form = _format(file)
    if form == ".jsonl":
        with file.open("rb") as stream:
            yield from _line_rows(_Bounded(stream, file))
    elif form == ".jsonl.gz":
        yield from _gzip_rows(file)
    elif form == ".json":
        yield from _json_rows(file)
    elif form == ".parquet":
        yield from table_rows(parquet_objects(file), str(file))
    else:
        raise DataError("has an unknown format", where=str(file), allowed=", ".join(SUFFIXES))


class _Growth:
    """Refuses a compressed file that grows as no real data does."""

    def __init__(self, file: Path) -> None:
        self._total = 0
        self._file = file
        self._limit = max(EXPANSION_FROM, EXPANSION * file.stat().st_size)

    def add(self, size: int) -> None:
        """So many bytes more were unpacked, or are going to be."""
        self._total += size
        if self._total > self._limit:
            raise DataError(
                f"grows to more than {self._limit:,} bytes when unpacked, which no real dataset does",
                where=str(self._file),
                hint="write it as plain .jsonl if you trust it",
            )


class _Bounded:
    """Lines of a binary stream, with a bound on each and on what a compressed file grows to."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, file: Path, growth: _Growth | None = None) -> None:
        self.file = file
        self._stream = stream
        self._growth = growth

    def __iter__(self) -> Iterator[bytes | None]:
        """Each line; None for one that is too long."""
        # Splitting at b"\n" alone: str.splitlines would also cut records at U+2028 and U+0085, which JSON allows.
        while line := self._read(MAX_LINE + 1):
            if len(line) <= MAX_LINE or line.endswith(b"\n"):
                yield line
                continue
            while (rest := self._read(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield None

    def _read(self, size: int) -> bytes:
        data = self._stream.readline(size)
        if self._growth is not None:
            self._growth.add(len(data))
        return data


def _line_rows(lines: _Bounded) -> Iterator[SourceRow]:
    for number, line in enumerate(lines, start=1):
        where = f"{lines.file}:{number}"
        if line is None:
            yield SourceRow(where, {}, f"the line is longer than {MAX_LINE:,} bytes")
            continue
        record = (line.removeprefix(_BOM) if number == 1 else line).strip()
        if record:
            yield _parsed(where, record)


def _gzip_rows(file: Path) -> Iterator[SourceRow]:
    try:
        with gzip.open(file, "rb") as stream:
            yield from _line_rows(_Bounded(stream, file, _Growth(file)))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"is damaged or cut: {error}", where=str(file), hint="fetch it again") from error


def _json_rows(file: Path) -> Iterator[SourceRow]:
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(_BOM).lstrip()
    # Many files called .json hold one object a line.
    if not start.startswith(b"["):
        with file.open("rb") as stream:
            yield from _line_rows(_Bounded(stream, file))
        return
    with file.open("rb") as stream:
        for where, item in list_items(stream, file, longest=2 * MAX_LINE):
            yield _checked(where, item, table=False)


def parquet_objects(file: Path, *, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """The rows of a Parquet file as the table reader gives them; a ``RowError`` for one that is not UTF-8.

    Args:
        file: The file.
        columns: Read only these; all of them when None.

    Raises:
        DataError: It is damaged, unpacks to more than any real dataset, or has not all ``columns``.
        OSError: It cannot be opened.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.open("rb") as stream:
        try:
            # Reading column by column in small pieces: by default a whole row group is fetched first.
            with pq.ParquetFile(stream, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as table:
                if columns and not {*columns} <= {*table.schema_arrow.names}:
                    raise DataError(f"has no columns {', '.join(columns)}", where=str(file))
                # What it says of itself, before anything is unpacked; then what comes out, since it can repeat a text.
                _Growth(file).add(sum(table.metadata.row_group(n).total_byte_size for n in range(table.num_row_groups)))
                growth = _Growth(file)
                for batch in table.iter_batches(batch_size=_BATCH, columns=columns):
                    for part in _decoded(batch, file):
                        growth.add(part.nbytes)
                        yield from _batch_rows(part)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"is damaged: {error}", where=str(file), hint="fetch it again") from error


def _decoded(batch: Any, file: Path) -> Iterator[Any]:
    """``batch``, or its rows one by one where texts are stored once and named by number, which hides their size."""
    import pyarrow as pa

    if any(
        pa.types.is_nested(field.type) and "dictionary<" in str(field.type) and not pa.types.is_dictionary(field.type)
        for field in batch.schema
    ):
        raise DataError("has dictionaries within lists or objects", where=str(file), hint="write it with plain columns")
    if not any(pa.types.is_dictionary(field.type) for field in batch.schema):
        yield batch
        return
    for index in range(batch.num_rows):
        columns = [
            column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
            for column in batch.slice(index, 1).columns
        ]
        yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _batch_rows(batch: Any) -> Iterator[Any]:
    """The rows of a batch as objects; large ones one at a time, since a short file can repeat a long text."""
    if batch.nbytes <= _BATCH_BYTES:
        try:
            yield from batch.to_pylist()
        except UnicodeDecodeError:
            pass
        else:
            return
    for index in range(batch.num_rows):
        try:
            yield from batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            yield RowError(f"holds text that is not UTF-8 at byte {error.start + 1}")


def _parsed(where: str, line: bytes) -> SourceRow:
    try:
        value = _loads(line)
    except RowError as error:
        return SourceRow(where, {}, str(error))
    return _checked(where, value, table=False)


def _checked(where: str, value: Any, *, table: bool) -> SourceRow:
    try:
        return SourceRow(where, clean_row(value, table=table))
    except RowError as error:
        return SourceRow(where, {}, str(error))


def _loads(data: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, no numbers of thousands of digits."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise RowError(f"is not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise RowError("is nested too deeply") from error
    except ValueError as error:
        raise RowError(f"is not JSON: {error}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")

"""Rows on disk: shards that are whole or not there, and one description of all of them.

``shard-00000.kdsc``: a head (a mark, the bits of a level, the digests of the id code and of the cache's identity), the
rows' bytes, an index of fixed-size records, and a footer with the index's checksum. Every record has the checksum of
its row. ``counts.bin``: how often each id was kept in the sample the id code was made from. ``cache.json``, written
last: what the cache belongs to, the sha256 of every shard's index, and a hash of itself. No shard is ever changed, so a
cache grows by new shards and a new description.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from kdkit.api.errors import DataError
from kdkit.train.signal_cache.description import (
    DESCRIPTION,
    FORMAT,
    MOST_VOCABULARY,
    Description,
    Start,
    read_description,
    self_hash,
)
from kdkit.train.signal_cache.encode import MOST_BYTES, Kept, decode_row, encode_row
from kdkit.train.signal_cache.files import open_file, place, read_file, write_file
from kdkit.train.signal_cache.ids import IdCode
from kdkit.train.signal_cache.rows import Row, id_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Entry", "Reader", "Writer", "read_counts", "write_counts"]

MOST_SHARDS: Final = 100_000
_COUNTS: Final = "counts.bin"
_MARK: Final = b"KDSC\x02\n"
_HEAD: Final = struct.Struct("<6sB32s32s")
_FOOTER: Final = struct.Struct("<QII6s")
_RECORD: Final = np.dtype(
    [("id", "S8"), ("row", "S16"), ("offset", "<u8"), ("size", "<u4"), ("tokens", "<u4"), ("crc", "<u4")]
)
_AGAIN: Final = "make the cache again"


@dataclass(frozen=True, slots=True)
class Entry:
    """A row with what the teacher says about it."""

    row: Row
    kept: Kept


def write_counts(directory: Path, counts: NDArray[np.int64]) -> None:
    """Write ``counts.bin``: 16 bits an id, compressed."""
    clipped = np.minimum(counts, 2**16 - 1).astype("<u2")
    write_file(directory / _COUNTS, zlib.compress(clipped.tobytes(), 9))


def read_counts(directory: Path, vocabulary: int) -> NDArray[np.int64]:
    """What :func:`write_counts` wrote.

    Raises:
        DataError: The file is damaged.
    """
    path = directory / _COUNTS
    if not 0 < vocabulary <= MOST_VOCABULARY:
        raise DataError(f"a vocabulary of {vocabulary:,} ids", where=str(path), allowed=f"1 to {MOST_VOCABULARY:,}")
    size = 2 * vocabulary
    try:
        # Never more than it should be, whatever the file says.
        data = zlib.decompressobj().decompress(read_file(path, size + size // 100 + 100), size + 1)
    except zlib.error as error:
        raise DataError("cannot be read", where=str(path)) from error
    if len(data) != size:
        raise DataError(f"is damaged: {len(data)} bytes for {vocabulary} ids", where=str(path))
    return np.frombuffer(data, dtype="<u2").astype(np.int64)


class Writer:
    """Adds shards to a directory.

    Args:
        directory: Where the cache is or will be; leftovers of files that were not finished are removed.
        start: What the cache belongs to. Its id code must be the one of ``counts.bin``.

    Raises:
        DataError: ``counts.bin`` is damaged, or another.
    """

    def __init__(self, directory: Path, start: Start) -> None:
        self._directory, self._start = directory, start
        for leftover in directory.glob("*.tmp"):
            leftover.unlink()
        self._code = _code(directory, start)
        self._head = _head(start)

    def path(self, number: int) -> Path:
        """The file of shard ``number``."""
        return self._directory / f"shard-{number:05d}.kdsc"

    def has(self, number: int, rows: Sequence[Row]) -> bool:
        """Whether shard ``number`` is there, undamaged, written for this identity and code, with exactly these rows."""
        try:
            index, _ = _read_index(self.path(number), self._head)
            if index["row"].tolist() != np.array([row.hash for row in rows], dtype="S16").tolist():
                return False
            _check_rows(self.path(number), index)
        except DataError:
            return False
        return True

    def write(self, number: int, rows: Sequence[Row], entries: Iterable[Entry]) -> None:
        """Write shard ``number`` with ``rows`` in their order; ``entries`` may come in any.

        Only bytes are held of entries that were seen. The shard is written under another name first, so that it is
        whole or not there.
        """
        packed = {entry.row.hash: self._pack(entry) for entry in entries}
        records, parts, offset = [], [self._head], len(self._head)
        for row in rows:
            tokens, data = packed[row.hash]
            records.append((id_hash(row.id), row.hash, offset, len(data), tokens, zlib.crc32(data)))
            parts.append(data)
            offset += len(data)
        index = np.array(records, dtype=_RECORD).tobytes()
        footer = _FOOTER.pack(offset, len(records), zlib.crc32(index), _MARK)
        write_file(self.path(number), b"".join((*parts, index, footer)))

    def adopt(self, base: Reader) -> None:
        """Take the shards of ``base`` as the first ones; those that are there already stay.

        Raises:
            DataError: One of them is damaged.
        """
        for number, source in enumerate(base.files):
            index, digest = _read_index(source, self._head)
            try:
                found = _read_index(self.path(number), self._head)[1]
                _check_rows(self.path(number), index)
            except DataError:
                found = ""
            if found != digest:
                _check_rows(source, index)
                place(source, self.path(number))

    def finish(self, shards: int) -> Description:
        """Write ``cache.json`` for the first ``shards`` shards; files of other shards are removed.

        Raises:
            DataError: A shard is damaged.
        """
        files, tokens, rows, size = {}, 0, 0, (self._directory / _COUNTS).stat().st_size
        for number in range(shards):
            path = self.path(number)
            index, digest = _read_index(path, self._head)
            files[path.name] = digest
            rows, tokens, size = rows + len(index), tokens + int(index["tokens"].sum()), size + path.stat().st_size
        for path in self._directory.glob("shard-*.kdsc"):
            if path.name not in files:
                path.unlink()
        about, text = self._describe(files, {"rows": rows, "tokens": tokens}, size)
        write_file(self._directory / DESCRIPTION, text)
        return about

    def _pack(self, entry: Entry) -> tuple[int, bytes]:
        return entry.kept.tokens, encode_row(entry.kept, self._code, self._start.rule.bits)

    def _describe(self, files: dict[str, str], totals: dict[str, int], size: int) -> tuple[Description, bytes]:
        """The description as data and as text; its own bytes count, too."""
        text = b""
        while True:
            full = size + len(text)
            data = {**self._start.model_dump(), "format": FORMAT, "shards": files, "totals": {**totals, "bytes": full}}
            whole = {**data, "sha256": self_hash(data)}
            text = (json.dumps(whole, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode()
            # The number of bytes is one of them: longer by a digit at most, so that this ends.
            if full == size + len(text):
                return Description.model_validate(data), text


class Reader:
    """A finished cache. The index of all rows is in memory, 44 bytes a row; rows are read when they are asked for.

    Attributes:
        description: The content of ``cache.json``.
        files: The shards.

    Raises:
        DataError: It is not finished, damaged, or of another format.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.description = read_description(directory)
        self.files = [directory / name for name in self.description.shards]
        indices, owners, head = [], [], _head(self.description)
        for number, (path, digest) in enumerate(zip(self.files, self.description.shards.values(), strict=True)):
            index, found = _read_index(path, head)
            if found != digest:
                raise DataError("is not the shard that cache.json describes", where=str(path), hint=_AGAIN)
            indices.append(index)
            owners.append(np.full(len(index), number, dtype=np.int32))
        index = np.concatenate(indices) if indices else np.empty(0, dtype=_RECORD)
        owner = np.concatenate(owners) if owners else np.empty(0, dtype=np.int32)
        order = np.argsort(index["row"], kind="stable")
        self._index, self._owner = index[order], owner[order]
        self._ids: NDArray[Any] | None = None

    @cached_property
    def code(self) -> IdCode:
        """The code of the ids. It is made when it is first asked for: after the student's width was compared.

        Raises:
            DataError: ``counts.bin`` is damaged, or another.
        """
        return _code(self._directory, self.description)

    def find(self, row_hash: bytes) -> int | None:
        """The place of the row with this content, or None."""
        key = np.array(row_hash, dtype="S16")
        found = int(np.searchsorted(self._index["row"], key))
        return found if found < len(self._index) and self._index["row"][found] == key else None

    def knows(self, example_id: str) -> bool:
        """Whether a row of this name is there, whatever its content."""
        if self._ids is None:
            self._ids = np.sort(self._index["id"])
        key = np.array(id_hash(example_id), dtype="S8")
        found = int(np.searchsorted(self._ids, key))
        return found < len(self._ids) and bool(self._ids[found] == key)

    def read(self, number: int) -> Kept:
        """What is kept of the row at place ``number``.

        Raises:
            DataError: Its bytes are damaged.
        """
        record, path = self._index[number], self.files[self._owner[number]]
        with open_file(path) as stream:
            data = _row(stream, record, path)
        try:
            return decode_row(data, int(record["tokens"]), self.code)
        except DataError as error:
            raise _damaged(record, path, f": {error.what}") from error


def _code(directory: Path, start: Start) -> IdCode:
    code = IdCode(read_counts(directory, start.vocabulary.width))
    if code.digest != start.code:
        raise DataError("counts.bin is not the one that belongs to this cache", where=str(directory), hint=_AGAIN)
    return code


def _head(start: Start) -> bytes:
    return _HEAD.pack(_MARK, start.rule.bits, bytes.fromhex(start.code), bytes.fromhex(start.digest))


def _read_index(path: Path, head: bytes) -> tuple[NDArray[Any], str]:
    """The index of a shard with this head, and its sha256 (hex).

    Raises:
        DataError: It is missing, cut off, damaged, or of another cache.
    """
    with open_file(path) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        found = stream.read(len(head))
        stream.seek(max(0, size - _FOOTER.size))
        try:
            end, rows, crc, mark = _FOOTER.unpack(stream.read(_FOOTER.size))
        except struct.error as error:
            raise DataError("is cut off or damaged", where=str(path), hint=_AGAIN) from error
        whole = end + rows * _RECORD.itemsize + _FOOTER.size == size and end >= len(head)
        if mark != _MARK or found[: len(_MARK)] != _MARK or not whole:
            raise DataError("is cut off or damaged", where=str(path), hint=_AGAIN)
        if found != head:
            raise DataError("belongs to another cache: its teacher, rule or id code", where=str(path), hint=_AGAIN)
        stream.seek(end)
        data = stream.read(rows * _RECORD.itemsize)
    index = np.frombuffer(data, dtype=_RECORD)
    if zlib.crc32(data) != crc or not _possible(index, len(head), end):
        raise DataError("has a damaged index", where=str(path), hint=_AGAIN)
    return index, hashlib.sha256(data).hexdigest()


def _possible(index: NDArray[Any], begin: int, end: int) -> bool:
    """Whether every row lies within the shard, and has tokens."""
    offset, size = index["offset"], index["size"].astype(np.uint64)
    inside = (offset >= begin) & (offset <= end) & (size <= MOST_BYTES)
    # Only of offsets that lie inside: the difference has no sign.
    inside &= size <= np.where(inside, np.uint64(end) - offset, np.uint64(0))
    return bool((inside & (index["tokens"] > 0)).all())


def _check_rows(path: Path, index: NDArray[Any]) -> None:
    """Refuse a shard with a row whose bytes are damaged."""
    with open_file(path) as stream:
        for record in index:
            _row(stream, record, path)


def _row(stream: BinaryIO, record: Any, path: Path) -> bytes:
    stream.seek(int(record["offset"]))
    data = stream.read(int(record["size"]))
    if zlib.crc32(data) != int(record["crc"]):
        raise _damaged(record, path)
    return data


def _damaged(record: Any, path: Path, why: str = "") -> DataError:
    return DataError(f"a row is damaged{why}", where=f"{path} at byte {int(record['offset'])}", hint=_AGAIN)

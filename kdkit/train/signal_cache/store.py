"""Rows on disk: shards that are whole or not there, and one description of all of them.

``shard-00000.kdsc``: a mark, the rows' bytes, an index of fixed-size records, and a footer with the index's checksum.
Every record has the checksum of its row. ``counts.bin``: how often each id was kept in the sample the id code was made
from. ``cache.json``, written last: what the cache belongs to, the sha256 of every shard's index, and a hash of itself.
No shard is ever changed, so a cache grows by new shards and a new description.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kdkit.api.errors import DataError
from kdkit.train.signal_cache.encode import Kept, decode_row, encode_row
from kdkit.train.signal_cache.ids import IdCode
from kdkit.train.signal_cache.rows import Row, id_hash

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DESCRIPTION", "FORMAT", "Entry", "Reader", "Writer", "read_counts", "write_counts"]

FORMAT: Final = 1
"""Raise it when bytes mean something else; a cache of another format is refused."""
DESCRIPTION: Final = "cache.json"
_COUNTS: Final = "counts.bin"
_MARK: Final = b"KDSC\x01\n"
_FOOTER: Final = struct.Struct("<QII6s")
_RECORD: Final = np.dtype(
    [("id", "S8"), ("row", "S16"), ("offset", "<u8"), ("size", "<u4"), ("tokens", "<u4"), ("crc", "<u4")]
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A row with what the teacher says about it."""

    row: Row
    kept: Kept


def write_counts(directory: Path, counts: NDArray[np.int64]) -> None:
    """Write ``counts.bin``: 16 bits an id, compressed."""
    clipped = np.minimum(counts, 2**16 - 1).astype("<u2")
    _write(directory / _COUNTS, zlib.compress(clipped.tobytes(), 9))


def read_counts(directory: Path, vocabulary: int) -> NDArray[np.int64]:
    """What :func:`write_counts` wrote.

    Raises:
        DataError: The file is damaged.
    """
    path = directory / _COUNTS
    try:
        # Never more than it should be, whatever the file says.
        data = zlib.decompressobj().decompress(path.read_bytes(), 2 * vocabulary + 1)
    except (OSError, zlib.error) as error:
        raise DataError("cannot be read", where=str(path)) from error
    if len(data) != 2 * vocabulary:
        raise DataError(f"is damaged: {len(data)} bytes for {vocabulary} ids", where=str(path))
    return np.frombuffer(data, dtype="<u2").astype(np.int64)


class Writer:
    """Adds shards to a directory.

    Args:
        directory: Where the cache is or will be; leftovers of a shard that was not finished are removed.
        code: The code of the ids.
        bits: Bits of a level.
    """

    def __init__(self, directory: Path, code: IdCode, bits: int) -> None:
        self._directory, self._code, self._bits = directory, code, bits
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("*.tmp"):
            leftover.unlink()

    def path(self, number: int) -> Path:
        """The file of shard ``number``."""
        return self._directory / f"shard-{number:05d}.kdsc"

    def has(self, number: int, rows: Sequence[Row]) -> bool:
        """Whether shard ``number`` is there, undamaged, and holds exactly these rows."""
        try:
            index, _ = _read_index(self.path(number))
            if index["row"].tolist() != np.array([row.hash for row in rows], dtype="S16").tolist():
                return False
            content = self.path(number).read_bytes()
        except (DataError, OSError):
            return False
        spans = zip(index["offset"].tolist(), index["size"].tolist(), index["crc"].tolist(), strict=True)
        return all(zlib.crc32(content[offset : offset + size]) == crc for offset, size, crc in spans)

    def write(self, number: int, entries: Iterable[Entry]) -> None:
        """Write shard ``number``: under another name first, so that it is whole or not there."""
        records, parts, offset = [], [_MARK], len(_MARK)
        for entry in entries:
            data = encode_row(entry.kept, self._code, self._bits)
            row = entry.row
            records.append((id_hash(row.id), row.hash, offset, len(data), entry.kept.tokens, zlib.crc32(data)))
            parts.append(data)
            offset += len(data)
        index = np.array(records, dtype=_RECORD).tobytes()
        footer = _FOOTER.pack(offset, len(records), zlib.crc32(index), _MARK)
        _write(self.path(number), b"".join((*parts, index, footer)))

    def finish(self, shards: int, description: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``cache.json`` for the first ``shards`` shards: ``description``, the shards, and totals."""
        files, tokens, rows, kept_bytes = {}, 0, 0, (self._directory / _COUNTS).stat().st_size
        for number in range(shards):
            index, digest = _read_index(self.path(number))
            files[self.path(number).name] = digest
            rows, tokens = rows + len(index), tokens + int(index["tokens"].sum())
            kept_bytes += self.path(number).stat().st_size
        totals = {"rows": rows, "tokens": tokens, "bytes": kept_bytes}
        data = {"format": FORMAT, **description, "code": self._code.digest, "shards": files, "totals": totals}
        text = json.dumps({**data, "sha256": _self_hash(data)}, indent=2, ensure_ascii=True, allow_nan=False)
        _write(self._directory / DESCRIPTION, (text + "\n").encode())
        return data


class Reader:
    """A finished cache. The index of all rows is in memory, 44 bytes a row; rows are read when they are asked for.

    Attributes:
        description: The content of ``cache.json``.

    Raises:
        DataError: It is not finished, damaged, or of another format.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.description = _description(directory)
        indices, owners = [], []
        for number, (name, digest) in enumerate(self.description["shards"].items()):
            index, found = _read_index(directory / name)
            if found != digest:
                raise DataError("is not the shard that cache.json describes", where=str(directory / name))
            indices.append(index)
            owners.append(np.full(len(index), number, dtype=np.int32))
        self._files = [directory / name for name in self.description["shards"]]
        index = np.concatenate(indices) if indices else np.empty(0, dtype=_RECORD)
        owner = np.concatenate(owners) if owners else np.empty(0, dtype=np.int32)
        order = np.argsort(index["row"], kind="stable")
        self._index, self._owner = index[order], owner[order]
        self._ids: NDArray[Any] | None = None
        self._code = IdCode(read_counts(directory, int(self.description["vocabulary"]["width"])))
        if self._code.digest != self.description["code"]:
            raise DataError("counts.bin is not the one cache.json describes", where=str(directory))

    def find(self, row_hash: bytes) -> int | None:
        """The place of the row with this content, or None."""
        key = np.array(row_hash, dtype="S16")
        place = int(np.searchsorted(self._index["row"], key))
        return place if place < len(self._index) and self._index["row"][place] == key else None

    def knows(self, example_id: str) -> bool:
        """Whether a row of this name is there, whatever its content."""
        if self._ids is None:
            self._ids = np.sort(self._index["id"])
        key = np.array(id_hash(example_id), dtype="S8")
        place = int(np.searchsorted(self._ids, key))
        return place < len(self._ids) and bool(self._ids[place] == key)

    def read(self, place: int) -> Kept:
        """What is kept of the row at ``place``.

        Raises:
            DataError: Its bytes are damaged.
        """
        record, path = self._index[place], self._files[self._owner[place]]
        try:
            with path.open("rb") as stream:
                stream.seek(int(record["offset"]))
                data = stream.read(int(record["size"]))
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
        where = f"{path} at byte {int(record['offset'])}"
        if zlib.crc32(data) != int(record["crc"]):
            raise DataError("a row is damaged", where=where, hint="make the cache again")
        try:
            return decode_row(data, int(record["tokens"]), self._code)
        except DataError as error:
            raise DataError(f"a row is damaged: {error.what}", where=where, hint="make the cache again") from error


def _read_index(path: Path) -> tuple[NDArray[Any], str]:
    """The index of a shard and its sha256 (hex).

    Raises:
        DataError: It is missing, cut off or damaged.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _FOOTER.size))
            offset, rows, crc, mark = _FOOTER.unpack(stream.read(_FOOTER.size))
            if mark != _MARK or offset + rows * _RECORD.itemsize + _FOOTER.size != size:
                raise DataError("is cut off or damaged", where=str(path), hint="make the cache again")
            stream.seek(offset)
            data = stream.read(rows * _RECORD.itemsize)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except struct.error as error:
        raise DataError("is cut off or damaged", where=str(path), hint="make the cache again") from error
    if zlib.crc32(data) != crc:
        raise DataError("has a damaged index", where=str(path), hint="make the cache again")
    return np.frombuffer(data, dtype=_RECORD), hashlib.sha256(data).hexdigest()


def _description(directory: Path) -> dict[str, Any]:
    path = directory / DESCRIPTION
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        claimed = data.pop("sha256")
        if data["format"] != FORMAT:
            raise DataError(f"has format {data['format']!r}", where=str(path), allowed=str(FORMAT))
    except FileNotFoundError as error:
        raise DataError("is no finished teacher cache: it has no cache.json", where=str(directory)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("cannot be read", where=str(path)) from error
    if claimed != _self_hash(data):
        raise DataError("was changed after it was written", where=str(path), hint="make the cache again")
    return dict(data)


def _self_hash(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """A file with this content, or none: written under another name, flushed, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)

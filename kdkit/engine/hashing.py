"""Content hashes of files, remembered so that an untouched file is never read twice."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from kdkit.engine.files import json_line, read_json, write_atomic

__all__ = ["HashMemo", "digest_of", "files_below", "hash_tree"]


def files_below(root: Path) -> Iterator[Path]:
    """Every regular file below ``root`` in a stable order; links to files count, directories are not followed."""
    for directory, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            file = Path(directory) / name
            # A pipe or socket has no content, and opening one would block.
            if file.is_file():
                yield file


def digest_of(hashes: Mapping[str, str]) -> str:
    """One hash for many files: relative names and contents, in sorted order."""
    lines = "".join(f"{name}\0{value}\n" for name, value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_tree(path: Path, memo: HashMemo) -> str:
    """The hash of a file's content, or of a directory's names and contents.

    Raises:
        OSError: Something cannot be read.
    """
    if path.is_dir():
        return digest_of({file.relative_to(path).as_posix(): memo.sha256(file) for file in files_below(path)})
    return memo.sha256(path)


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


class HashMemo:
    """File hashes by real path, valid while size and times stay the same.

    The change time is compared too, so that an edit followed by a restored modification time is still seen.
    """

    # A file that changes twice within one tick of the file system's clock keeps its times, so the hash of a file that
    # was just written is used but not remembered.
    SETTLED_SECONDS: Final = 2.0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._read()
        self._new: dict[str, list[Any]] = {}

    def sha256(self, file: Path) -> str:
        """The hash of ``file``, read only when it changed since it was last asked for."""
        real = file.resolve()
        before = real.stat()
        known = self._new.get(str(real)) or self._known.get(str(real))
        if isinstance(known, list) and known[:3] == _stamp(before) and len(known) == 4:
            return str(known[3])
        with real.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._note(real, before, digest)
        return digest

    def remember(self, file: Path, digest: str) -> None:
        """Note a hash that is already known, such as that of a file which was renamed after it was read."""
        real = file.resolve()
        self._note(real, real.stat(), digest)

    def _note(self, real: Path, stat: os.stat_result, digest: str) -> None:
        if time.time() - max(stat.st_mtime, stat.st_ctime) > self.SETTLED_SECONDS:
            self._new[str(real)] = [*_stamp(stat), digest]

    def save(self) -> None:
        """Add what was learned to the file, atomically. It is only a memory: failing to write it costs time later."""
        if not self._new:
            return
        merged = {**self._read(), **self._new}
        alive = {name: entry for name, entry in merged.items() if Path(name).exists()}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, json_line(alive))
        self._known.update(self._new)
        self._new.clear()

    def _read(self) -> dict[str, Any]:
        try:
            data = read_json(self._path)
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

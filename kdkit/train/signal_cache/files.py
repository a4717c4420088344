"""Files of a cache: read only where they lie and as long as they may be, written whole and durably."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kdkit.api.errors import DataError

__all__ = ["open_file", "place", "read_file", "write_file"]


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A regular file, for reading. Links are not followed, and a pipe without a writer is not waited for.

    Raises:
        DataError: It is missing, something else, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        what = "is a link; a cache has its files beside each other" if error.errno == errno.ELOOP else None
        raise DataError(what or f"cannot be read: {error.strerror}", where=str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError("is no regular file", where=str(path))
    with os.fdopen(descriptor, "rb") as stream:
        try:
            yield stream
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error


def read_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        DataError: It is missing, larger, something else, or cannot be read.
    """
    with open_file(path) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise DataError(f"is larger than the {most:,} bytes it may have", where=str(path))
    return data


def write_file(path: Path, data: bytes) -> None:
    """A file with this content, or none: written under another name, flushed, renamed, and its name flushed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    _rename(temporary, path)


def place(source: Path, target: Path) -> None:
    """The file ``source`` also as ``target``: one file with two names where that is possible, a copy elsewhere."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    linked = False
    # A file of somebody else stays alone: what is published gets its permissions from us.
    if source.stat().st_uid == os.getuid():
        try:
            os.link(source, temporary)
            linked = True
        except OSError:  # another file system, or one without links
            linked = False
    if not linked:
        shutil.copyfile(source, temporary)
        _flush(temporary)
    _rename(temporary, target)


def _rename(temporary: Path, path: Path) -> None:
    temporary.replace(path)
    # Of two names of one file, renaming one to the other leaves both.
    temporary.unlink(missing_ok=True)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Writing files so that a crash leaves either the old or the new content, and one line when the disk says no."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kdkit.api.errors import EnvironmentUnmet

__all__ = [
    "canonical_json",
    "check_writable",
    "environment_error",
    "fsync_directory",
    "json_line",
    "read_json",
    "write_atomic",
    "write_json",
]

_UNMET: Final[Mapping[int, str]] = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this process may write",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.ENOTDIR: "a part of the path is no directory",
    errno.EIO: "the device reports an input/output error",
}
"""Errors of the machine, not of the program: errno to what a person calls it."""


def environment_error(error: OSError, *, where: Path | str | None = None, hint: str | None = None) -> EnvironmentUnmet:
    """The one-line form of an operating-system error."""
    name = where if where is not None else error.filename
    what = _UNMET.get(error.errno or 0) or error.strerror or str(error)
    return EnvironmentUnmet(what, where=str(name) if name is not None else None, hint=hint)


def is_environment_error(error: OSError) -> bool:
    """Whether the machine is to blame (disk, permission, device) rather than a missing or odd file."""
    return error.errno in _UNMET


def _finite(value: Any) -> Any:
    """``value`` with the numbers that JSON lacks as the strings ``NaN``, ``Infinity`` and ``-Infinity``."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def json_line(data: Any) -> str:
    """One line of valid JSON. Numbers of other libraries become floats, anything else its text."""
    return json.dumps(_finite(data), ensure_ascii=False, default=_plain, allow_nan=False)


def _plain(value: Any) -> Any:
    try:
        return _finite(float(value))
    except (TypeError, ValueError):
        return str(value)


def canonical_json(data: Any) -> str:
    """JSON that is the same for equal data, whatever the order of its keys."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def read_json(path: Path) -> Any:
    """The JSON in ``path``; raises ``OSError`` or ``ValueError``."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` atomically and durably, indented for people."""
    write_atomic(path, json.dumps(_finite(data), indent=2, ensure_ascii=False, default=_plain, allow_nan=False) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` with ``text``: a temporary sibling is flushed to disk and renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        # Gone already when all went well.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def fsync_file(path: Path) -> None:
    """Flush one file's content to disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_directory(path: Path) -> None:
    """Flush a directory's names to disk, so that a rename survives a power cut."""
    fsync_file(path)


def check_writable(directory: Path, *, hint: str) -> None:
    """Create ``directory`` and really write to it, before any work depends on it.

    Raises:
        EnvironmentUnmet: It cannot be created or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as stream:
            stream.write(b"\0" * 4096)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise EnvironmentUnmet(
            f"cannot be written: {environment_error(error).what}", where=str(directory), hint=hint
        ) from error

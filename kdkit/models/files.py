"""Writing directories so that they are whole or absent, and saying clearly why a write failed. Light."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from kdkit.api.errors import EnvironmentUnmet, ModelError

__all__ = ["settle", "staged", "write_errors"]

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST})


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable ``path`` inside the block into one line.

    Raises:
        EnvironmentUnmet: The disk is full, or the path may not be written; other errors pass.
    """
    try:
        yield
    except OSError as error:
        # numpy has no errno, only "28560 requested and 5920 written".
        if error.errno in _FULL or (error.errno is None and str(error).endswith(" written")):
            raise _full(path) from error
        if error.errno in _FORBIDDEN:
            where = str(error.filename or path)
            raise EnvironmentUnmet(f"cannot be written: {error.strerror}", where=where) from error
        raise
    except (RuntimeError, SafetensorError) as error:
        # The Rust and C++ writers (safetensors, the Hub's download) have no errno, only its text.
        if any(text in str(error) for text in ("No space left", "os error 28", "os error 122", "File too large")):
            raise _full(path) from error
        raise


def _full(path: Path) -> EnvironmentUnmet:
    nearest = next((parent for parent in (path, *path.parents) if parent.exists()), Path("/"))
    free = shutil.disk_usage(nearest).free
    return EnvironmentUnmet(
        f"not enough room on the disk ({free / 1e6:.0f} MB free)", where=str(path), hint="free some space and try again"
    )


@contextmanager
def staged(dest: Path) -> Iterator[Path]:
    """A fresh sibling of ``dest`` that becomes ``dest`` when the block succeeds and vanishes when it does not.

    Raises:
        ModelError: ``dest`` already holds something.
        EnvironmentUnmet: The disk is full or the place is not writable.
    """
    with write_errors(dest):
        if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
            raise ModelError("already exists", where=str(dest), hint="remove it first, or choose another directory")
        dest.parent.mkdir(parents=True, exist_ok=True)
        temporary = dest.parent / f".{dest.name}.{secrets.token_hex(4)}"
        temporary.mkdir()
        try:
            yield temporary
            settle(temporary)
            temporary.replace(dest)
            _sync(dest.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def settle(directory: Path) -> None:
    """Give every file below ``directory`` ordinary permissions (0644 less the umask) and put it on the disk."""
    # safetensors writes through a private temporary file (0600), which nobody else could read afterwards. The umask
    # of the process can only be read by setting it, which is not safe with threads; a new file tells it.
    probe = directory / f".mode-{secrets.token_hex(4)}"
    probe.touch()
    mode = 0o644 & probe.stat().st_mode
    probe.unlink()
    for parent, _, names in os.walk(directory):
        for name in names:
            file = Path(parent, name)
            file.chmod(mode)
            _sync(file)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

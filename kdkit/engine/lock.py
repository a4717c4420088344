"""One process at a time works on a store entry. The lock vanishes with its holders, also after ``kill -9``."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from kdkit.api.errors import EnvironmentUnmet
from kdkit.engine.files import environment_error

__all__ = ["Lock"]


class Lock:
    """An exclusive lock on a file, held while the object is open.

    Attributes:
        handle: The file descriptor. A worker process inherits it, so that the entry stays locked while any of the two
            is alive.
    """

    def __init__(self, path: Path, *, what: str) -> None:
        """Take the lock without waiting.

        Raises:
            EnvironmentUnmet: Another process holds it; the error names it.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise environment_error(error, where=path) from error
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self.handle, 200, 0).decode(errors="replace").strip()
            os.close(self.handle)
            raise EnvironmentUnmet(
                f"another run works on it ({holder or 'holder unknown'})", where=what, hint="wait for it, or stop it"
            ) from error
        except OSError as error:
            os.close(self.handle)
            raise environment_error(error, where=path, hint="the file system must support flock") from error
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def close(self) -> None:
        """Let go of the lock; it is free once every process that inherited it is gone too."""
        os.close(self.handle)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

"""Where things lie for a sandbox: a directory of the session, an interpreter and a user that may reach them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import re
import shutil
import stat
import sys
import sysconfig
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kdkit.api.errors import EnvironmentUnmet

__all__ = ["Interpreter", "SessionDir", "interpreter", "private_user", "reachable"]

_PREFIX: Final = "kdkit-sandbox-"
_OWNER: Final = re.compile(rf"{_PREFIX}(\d+)-\w+")
_FIRST_USER: Final = 62_000
_USERS: Final = 2_000
_WORKERS: Final = 64


def private_user(slot: int) -> int | None:
    """The user id that worker ``slot`` of this process gives its programs; None when this is not root already.

    An id that no account has: another process of the same user could be seen, and counted against its limits.
    """
    if os.geteuid() != 0:
        return None
    first = os.getpid() * _WORKERS % _USERS + slot
    for offset in range(_USERS):
        uid = _FIRST_USER + (first + offset) % _USERS
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid
    raise EnvironmentUnmet(f"every user id from {_FIRST_USER} to {_FIRST_USER + _USERS - 1} has an account")


def reachable(path: Path) -> bool:
    """Whether every user may read ``path`` and pass all directories above it."""
    try:
        above = all(parent.stat().st_mode & stat.S_IXOTH for parent in path.resolve().parents)
        mode = path.stat().st_mode
    except OSError:
        return False
    return above and bool(mode & stat.S_IROTH) and bool(mode & stat.S_IXOTH or not stat.S_ISDIR(mode))


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python installation without the virtual environment around it.

    Attributes:
        prefix: Where it lies.
        executable: Its program, relative to ``prefix``.
        library: Its standard library, relative to ``prefix``.
    """

    prefix: Path
    executable: str
    library: str

    @property
    def system(self) -> bool:
        """It is part of /usr, which a sandbox sees anyway."""
        return self.prefix.is_relative_to("/usr")


def interpreter() -> Interpreter:
    """The interpreter behind this process.

    Raises:
        EnvironmentUnmet: It cannot be located.
    """
    prefix = Path(sys.base_prefix).resolve()
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    executable = prefix / "bin" / name
    library = Path(sysconfig.get_path("stdlib", vars={"installed_base": str(prefix), "base": str(prefix)})).resolve()
    if not executable.exists() or not library.is_relative_to(prefix):
        raise EnvironmentUnmet(f"no interpreter at {executable}", hint="run kdkit with a complete Python installation")
    return Interpreter(prefix=prefix, executable=f"bin/{name}", library=str(library.relative_to(prefix)))


class SessionDir:
    """Files of one session that its programs' users may read: the code that runs inside, and their boxes.

    Directories of processes that were killed before they could clean up are removed on the way.

    Raises:
        EnvironmentUnmet: No directory for temporary files can be reached by every user.
    """

    def __init__(self) -> None:
        parent = next((p for p in _temporary() if os.geteuid() != 0 or reachable(p)), None)
        if parent is None:
            raise EnvironmentUnmet("no directory for temporary files that every user may reach", hint="set TMPDIR")
        _remove_orphans(parent)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)).resolve()
        # Held until the process ends: a container that shares this directory knows nothing of the process id.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._unlock = weakref.finalize(self, os.close, self._lock)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.geteuid() == 0:
            self.path.chmod(0o755)
        self.python = self.path / "python"
        self.python.mkdir(mode=0o755)
        self.code = self.path / "code"
        self._copy_code()

    def _copy_code(self) -> None:
        target = self.code / "inside"
        target.mkdir(parents=True)
        for source in sorted((Path(__file__).parent / "inside").glob("*.py")):
            (target / source.name).write_bytes(source.read_bytes())
        for path in (self.python, self.code, target, *target.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)

    def box(self, slot: int, uid: int | None) -> Path:
        """An empty directory that belongs to user ``uid`` alone."""
        path = self.path / f"box-{slot}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        if uid is not None:
            os.chown(path, uid, uid)
        return path

    def remove(self) -> None:
        """Delete it; may be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()


def _temporary() -> tuple[Path, ...]:
    return tuple(Path(p) for p in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm") if Path(p).is_dir())  # noqa: S108


def _remove_orphans(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        found = _OWNER.fullmatch(path.name)
        if not found:
            continue
        with contextlib.suppress(OSError):
            mine = not path.is_symlink() and path.lstat().st_uid == os.geteuid()
            if mine and not Path(f"/proc/{found[1]}").exists() and not _in_use(path):
                shutil.rmtree(path)


def _in_use(path: Path) -> bool:
    place = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(place)
    return False

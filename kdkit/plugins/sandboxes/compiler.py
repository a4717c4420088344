"""C++: compiled once per source in the jail, kept as a sealed memory file, executed for every test."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from kdkit.api.errors import EnvironmentUnmet
from kdkit.plugins.sandboxes.inside.supervise import OUTPUT
from kdkit.plugins.sandboxes.inside.task import Task

__all__ = ["COMPILE", "Binary", "BinaryCache", "command", "executable_file", "find_compiler"]

_MIB: Final = 2**20
COMPILE: Final = Task(
    kind="compile",
    cpu_s=10.0,
    wall_s=120.0,
    memory_bytes=1536 * _MIB,
    output_bytes=_MIB,
    file_bytes=64 * _MIB,
    processes=8,
    stack_bytes=64 * _MIB,
)
"""The profile of the compile step: it may start processes and write one directory.

No source makes a compiler sleep, so that the wall clock is only for a machine that gives it no core.
"""
_FLAGS: Final = ("-x", "c++", "-std=gnu++17", "-O2", "-pipe", "-w", "-fmax-errors=5", "-o", OUTPUT, "-")
_KEPT: Final = 64
_KEPT_BYTES: Final = 256 * _MIB
_MFD_EXEC: Final = 0x10


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled program, or what the compiler said instead."""

    descriptor: int | None
    errors: str = ""


def find_compiler() -> str:
    """Path of g++.

    Raises:
        EnvironmentUnmet: There is none below /usr, which is what a jail sees.
    """
    found = shutil.which("g++", path="/usr/bin:/usr/local/bin")
    if found is None:
        raise EnvironmentUnmet("no g++ in /usr/bin, which C++ programs need", hint="install the system package g++")
    return found


def command(compiler: str) -> list[str]:
    """The command that compiles standard input to the box."""
    return [compiler, *_FLAGS]


def executable_file(name: str) -> int:
    """A memory file that may be executed where the kernel asks for that to be said."""
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_EXEC)
    except OSError:
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def seal(descriptor: int) -> None:
    """No program shall change what the next test executes."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)


class BinaryCache:
    """The last compiled programs of a session, by source, flags and version of the compiler.

    As many as fit: a program of a few lines can be one of 64 MiB, and all of them lie in memory.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[str, Binary] = OrderedDict()
        self._lock = threading.Lock()
        self._version: str | None = None

    def key(self, source: str) -> str:
        """The content key of ``source``. Raises ``EnvironmentUnmet``: see :func:`find_compiler`."""
        if self._version is None:
            said = subprocess.run([find_compiler(), "--version"], capture_output=True, text=True, check=False, env={})
            self._version = said.stdout.partition("\n")[0]
        text = "\0".join([self._version, *_FLAGS, source])
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    def get(self, key: str) -> Binary | None:
        """The entry, or None; ``descriptor`` is a duplicate that belongs to the caller."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
            return Binary(None if found.descriptor is None else os.dup(found.descriptor), found.errors)

    def put(self, key: str, binary: Binary) -> None:
        """Keep ``binary``, whose descriptor belongs to the cache from now on; the oldest one may go."""
        with self._lock:
            if binary.descriptor is not None:
                seal(binary.descriptor)
            gone = [self._entries.pop(key, None)]
            self._entries[key] = binary
            # The new one stays whatever its size: the caller is about to run it.
            while len(self._entries) > 1 and (len(self._entries) > _KEPT or self._bytes() > _KEPT_BYTES):
                gone.append(self._entries.popitem(last=False)[1])
            _close(gone)

    def _bytes(self) -> int:
        return sum(os.fstat(b.descriptor).st_size for b in self._entries.values() if b.descriptor is not None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            _close(list(self._entries.values()))
            self._entries.clear()


def _close(binaries: list[Binary | None]) -> None:
    for binary in binaries:
        if binary is not None and binary.descriptor is not None:
            os.close(binary.descriptor)

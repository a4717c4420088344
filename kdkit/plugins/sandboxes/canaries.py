"""Small programs that try what a sandbox promises to prevent, run with the very command line that is used later.

A version check proves nothing: containers mask /proc, distributions forbid namespaces, kernels lack features.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from kdkit.api.sandboxes import SandboxCanary, SandboxJob, SandboxLimits, SandboxOutcome
from kdkit.plugins.sandboxes.jails import JAIL_ENVIRONMENT
from kdkit.plugins.sandboxes.session import Session

__all__ = ["LIMITS", "run_canaries"]

_MIB: Final = 2**20
LIMITS: Final = SandboxLimits(wall_s=2.0, cpu_s=1.0, memory_bytes=256 * _MIB, output_bytes=_MIB, processes=8)
"""What the canaries run under."""

_OPENS: Final = """
import sys
for path in sys.stdin.read().split("\\n"):
    try:
        with open(path, "rb") as file:
            print("read", path, file.read(16))
    except OSError:
        pass
"""
_LISTS: Final = """
import os, sys
for path in sys.stdin.read().split("\\n"):
    try:
        names = os.listdir(path)
    except OSError:
        continue
    if names:
        print("listed", path)
"""
_WRITES: Final = """
import os, sys
for place in sys.stdin.read().split("\\n"):
    path = f"{place}/kdkit-canary"
    try:
        with open(path, "wb") as file:
            file.write(b"x")
        os.unlink(path)
        print("wrote to", place)
    except OSError:
        pass
"""
_CONNECTS: Final = """
import socket
try:
    socket.create_connection(("127.0.0.1", int(input())), 1)
    print("connected")
except OSError:
    pass
"""
_FORKS: Final = """
import os
try:
    if os.fork() == 0:
        os._exit(0)
    print("forked")
except OSError:
    pass
"""
_SIGNALS: Final = """
import os
for pid in (int(input()), 1, -1):
    try:
        os.kill(pid, 0)
        print("may signal", pid)
    except OSError:
        pass
"""
_TRACES: Final = "import ctypes; ctypes.CDLL(None).ptrace(16, 1, 0, 0); print('traced')"
_PLACES: Final = (".", "/tmp", "/dev/shm", "/box")  # noqa: S108
_LEAVES: Final = """
import sys
name = input()
sys.modules[name] = sys
for place in sys.stdin.read().split():
    try:
        with open(f"{place}/{name}", "w") as file:
            file.write("left")
    except OSError:
        pass
print("done")
"""
_FINDS: Final = """
import os, sys
name = input()
if name in sys.modules:
    print("found a module")
for place in sys.stdin.read().split():
    if os.path.exists(f"{place}/{name}"):
        print("found a file in", place)
"""


@dataclass(frozen=True, slots=True)
class _Canary:
    name: str
    program: str
    judge: Callable[[SandboxOutcome], bool]
    stdin: str = ""


def _is(status: str) -> Callable[[SandboxOutcome], bool]:
    return lambda outcome: outcome.status == status


def _says(text: str) -> Callable[[SandboxOutcome], bool]:
    return lambda outcome: outcome.status == "ok" and outcome.stdout == text


_SILENT: Final = _says("")


def run_canaries(session: Session) -> tuple[SandboxCanary, ...]:
    """Run all of them; ``session`` was opened with :data:`LIMITS`."""
    with _secret() as secret, _server() as server:
        canaries = list(_canaries(secret, server))
        jobs = [SandboxJob(program=canary.program, stdin=canary.stdin) for canary in canaries]
        outcomes = session.run(jobs)
        found = [_found(canary, outcome) for canary, outcome in zip(canaries, outcomes, strict=True)]
        server.settimeout(0)
        if _was_reached(server):
            found = [_reached(canary) for canary in found]
    return (*found, *_isolation_between(session))


def _canaries(secret: Path, server: socket.socket) -> Iterator[_Canary]:
    own = os.getpid()
    home = Path.home()
    yield _Canary("hello", "print(input())", _says("hello\n"), "hello")
    yield _Canary("exit code", "raise SystemExit(3)", lambda o: (o.status, o.exit_code) == ("runtime-error", 3))
    yield _Canary("cpu limit", "while True: pass", _is("timeout"))
    yield _Canary("wall limit", "import time; time.sleep(60)", _is("timeout"))
    yield _Canary("memory limit", f"bytearray({1024 * _MIB})", _is("memory"))
    yield _Canary("output limit", f"print('x' * {8 * _MIB})", _cut_short)
    yield _Canary("unread input", "print('fine')", _says("fine\n"), "x" * _MIB)
    secrets_of_host = (secret, f"/proc/{own}/environ", f"/proc/{own}/cmdline", "/etc/passwd", "/etc/hostname")
    yield _Canary("files", _OPENS, _SILENT, "\n".join(map(str, secrets_of_host)))
    yield _Canary("home", _LISTS, _SILENT, f"{home}\n/home\n/root\n{Path.cwd()}\n/proc\n/sys")
    yield _Canary("writing", _WRITES, _SILENT, f"/\n/usr\n/usr/lib\n/var/tmp\n/dev\n/dev/shm\n{home}\n{secret.parent}")
    yield _Canary("environment", "import os; print(*os.environ)", _only_known_variables)
    yield _Canary("network", _CONNECTS, _SILENT, str(server.getsockname()[1]))
    yield _Canary("forks", _FORKS, _SILENT)
    yield _Canary("signals", _SIGNALS, _SILENT, str(own))
    yield _Canary("system calls", _TRACES, _is("security-violation"))


def _cut_short(outcome: SandboxOutcome) -> bool:
    """Stopped while it wrote, not judged afterwards by what it had written."""
    return outcome.status == "output-limit" and outcome.exit_code != 0


def _only_known_variables(outcome: SandboxOutcome) -> bool:
    return outcome.status == "ok" and set(outcome.stdout.split()) <= JAIL_ENVIRONMENT


def _found(canary: _Canary, outcome: SandboxOutcome) -> SandboxCanary:
    passed = canary.judge(outcome)
    said = outcome.reason or outcome.stdout or outcome.stderr
    detail = "" if passed else f"{outcome.status}: {said.strip().rpartition(chr(10))[2][:200]}".rstrip(": ")
    return SandboxCanary(name=canary.name, passed=passed, found=detail)


@contextmanager
def _secret() -> Iterator[Path]:
    """A file that the operating system lets everybody read: only the sandbox stands before it."""
    with tempfile.TemporaryDirectory(prefix="kdkit-canary-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        path = directory / "secret"
        path.write_text(secrets.token_hex(8), encoding="ascii")
        path.chmod(0o644)
        yield path


@contextmanager
def _server() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(4)
        yield server


def _was_reached(server: socket.socket) -> bool:
    try:
        connection, _ = server.accept()
    except OSError:
        return False
    connection.close()
    return True


def _reached(canary: SandboxCanary) -> SandboxCanary:
    """The judge saw a connection, whatever the program says."""
    return replace(canary, passed=False, found="a connection was made") if canary.name == "network" else canary


def _isolation_between(session: Session) -> Sequence[SandboxCanary]:
    """What one program leaves behind must not be there for the next, on every fork server."""
    name = f"kdkit-canary-{secrets.token_hex(8)}"
    stdin = "\n".join([name, *_PLACES])
    first = session.run([SandboxJob(program=_LEAVES, stdin=stdin)] * session.workers)
    second = session.run([SandboxJob(program=_FINDS, stdin=stdin)] * session.workers)
    for place in _PLACES:
        # Where the sandbox leaks, it leaked into this machine.
        with suppress(OSError):
            Path(place, name).unlink()
    found = [_found(_Canary("next program", _LEAVES, _says("done\n")), outcome) for outcome in first]
    found += [_found(_Canary("next program", _FINDS, _SILENT), outcome) for outcome in second]
    return [next((item for item in found if not item.passed), found[-1])]

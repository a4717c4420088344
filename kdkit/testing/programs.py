"""Programs that try to do harm, with the verdict that each has to get, and a host that sees whether they did.

Never run them outside a sandbox. They stand in ``data/hostile_python.txt`` and ``data/hostile_cpp.txt``, each below a
line ``=== NAME: VERDICT``. Each prints PWNED when it got what it wanted; what it may want is handed to it on standard
input as JSON: a world-readable ``secret``, a ``private`` file of the judge's own user, the pids of the ``judge`` and of
a ``victim``, a TCP ``port``, a ``unix`` socket and an ``abstract`` one, a directory ``outside`` and the ``token`` that
must not be found.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from kdkit.api.sandboxes import SandboxJob, SandboxLimits, SandboxOutcome

__all__ = ["EXACT", "HONEST", "LIMITS", "HostileHost", "HostileProgram", "hostile_host", "hostile_programs", "wrong"]

Language: TypeAlias = Literal["python", "cpp"]

_DATA: Final = Path(__file__).parent / "data"
_TOKEN: Final = "canary5f3a"  # noqa: S105 - a word to look for, no secret
_HEAD: Final = """
import json, os, sys
given = json.loads(sys.stdin.read())
"""
_RAW: Final = {
    "unclosed bracket": "print((((1\n",
    "nested brackets": "(" * 5000 + ")" * 5000,
    "null byte": "print(1)\0",
    "lone surrogate": "print('\ud800')",
    "return outside": "return 1\n",
}
LIMITS: Final = SandboxLimits(wall_s=8.0, cpu_s=1.0, memory_bytes=128 * 2**20, output_bytes=2**18, processes=8)
"""What the verdicts are about. Two programs sleep; all others end by themselves or by the CPU limit, also on a busy
machine.
"""
EXACT: Final[Mapping[str, tuple[int | None, int | None]]] = {
    "kills itself after the answer": (None, 9),
    "exit 137": (137, None),
    "exit with a text": (1, None),
    "claims an infrastructure error": (125, None),
    "crash": (None, 11),
    "C++ crash": (None, 11),
}
"""Exit code and signal of some of them."""
HONEST: Final[Mapping[Language, SandboxJob]] = {
    "python": SandboxJob(program="a, b = map(int, input().split())\nprint(a + b)", stdin="20 22"),
    "cpp": SandboxJob(
        program="#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }",
        language="cpp",
        stdin="20 22",
    ),
}
"""A program that answers 42, to be judged after each of them."""


@dataclass(frozen=True, slots=True)
class HostileProgram:
    """A program of the bank: its name, its text and the verdict that it has to get."""

    name: str
    source: str
    status: str
    language: Language = "python"


def hostile_programs(language: Language) -> list[HostileProgram]:
    """The bank, without programs that only another processor could run."""
    if language == "cpp":
        return [HostileProgram(name, source, status, "cpp") for name, status, source in _read("hostile_cpp.txt")]
    found = [HostileProgram(name, _HEAD + source, status) for name, status, source in _read("hostile_python.txt")]
    if platform.machine() != "x86_64":
        # They make system calls by number, or i386's.
        found = [one for one in found if "syscall(" not in one.source and "fromhex" not in one.source]
    return found + [HostileProgram(name, source, "compile-error") for name, source in _RAW.items()]


def _read(name: str) -> list[tuple[str, str, str]]:
    text = (_DATA / name).read_text(encoding="utf-8")
    return re.findall(r"^=== ([^\n]+): (\S+)\n(.*?)(?=^=== |\Z)", text, re.MULTILINE | re.DOTALL)


def wrong(program: HostileProgram, outcome: SandboxOutcome) -> Iterator[str]:
    """What is wrong with an outcome, one line each: the verdict, what was printed, how the program ended."""
    said = outcome.stdout + outcome.stderr
    if outcome.status != program.status:
        yield f"{program.name}: {outcome.status} instead of {program.status}: {outcome.reason or said[-300:]!r}"
    if "PWNED" in outcome.stdout or _TOKEN in said:
        yield f"{program.name}: {said[-300:]!r}"
    if program.name in EXACT and EXACT[program.name] != (outcome.exit_code, outcome.signal):
        yield f"{program.name}: exit code {outcome.exit_code}, signal {outcome.signal}"


class HostileHost:
    """What hostile programs may want, and whether they got it.

    Args:
        directory: A directory of its own, which every user may reach.
    """

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o755)
        self._directory = directory
        self._secret, self._private = directory / "secret", directory / "private"
        for path, mode in ((self._secret, 0o644), (self._private, 0o600), (directory / "expected-output", 0o644)):
            path.write_text(_TOKEN, encoding="utf-8")
            path.chmod(mode)
        self._outside = directory / "outside"
        self._outside.mkdir()
        self._outside.chmod(0o777)
        # A process of the same user that only sleeps.
        self._victim = subprocess.Popen(["sleep", "1000"], start_new_session=True)  # noqa: S607
        self._servers = [
            _server(socket.AF_INET, ("127.0.0.1", 0)),
            _server(socket.AF_UNIX, str(directory / "socket")),
            _server(socket.AF_UNIX, f"\0kdkit-{os.getpid()}"),
        ]
        (directory / "socket").chmod(0o777)

    def job(self, program: HostileProgram) -> SandboxJob:
        """The program with what it may want."""
        source = program.source.replace("@SECRET@", str(self._secret)).replace("@PRIVATE@", str(self._private))
        given = self._given() if program.source.startswith(_HEAD) else ""
        return SandboxJob(program=source, language=program.language, stdin=given)

    def _given(self) -> str:
        return json.dumps(
            {
                "secret": str(self._secret),
                "private": str(self._private),
                "judge": os.getpid(),
                "victim": self._victim.pid,
                "port": self._servers[0].getsockname()[1],
                "unix": str(self._directory / "socket"),
                "abstract": f"kdkit-{os.getpid()}",
                "outside": str(self._outside),
                "token": _TOKEN,
            }
        )

    def harm(self) -> Iterator[str]:
        """Everything that a program did to the host, one line each."""
        if self._victim.poll() is not None:
            yield "the victim is dead"
        for server in self._servers:
            try:
                server.accept()[0].close()
            except OSError:
                continue
            yield f"a connection to {server.getsockname()!r}"
        for path in (self._secret, self._private):
            if path.read_text(encoding="utf-8") != _TOKEN:
                yield f"{path.name} was changed"
        if list(self._outside.iterdir()):
            yield "something was written outside"
        for place in _places():
            if Path(place, "kdkit-hostile").exists():
                yield f"something was written to {place}"

    def close(self) -> None:
        """End the victim and the servers."""
        self._victim.kill()
        self._victim.wait()
        for server in self._servers:
            server.close()


def _server(family: int, address: object) -> socket.socket:
    server = socket.socket(family)
    server.bind(address)  # type: ignore[arg-type]
    server.listen(8)
    server.settimeout(0)
    return server


def _places() -> tuple[str, ...]:
    """Where hostile programs try to write."""
    return ("/", "/tmp", "/var/tmp", "/dev/shm", "/usr/lib", "/etc", str(Path.home()), str(Path.cwd()))  # noqa: S108


@contextmanager
def hostile_host() -> Iterator[HostileHost]:
    """A host in a directory that is removed afterwards; the token is in the environment, too."""
    with tempfile.TemporaryDirectory(prefix="kdkit-hostile-", dir="/tmp") as name, ExitStack() as stack:
        found = HostileHost(Path(name))
        stack.callback(found.close)
        os.environ["KDKIT_TEST_SECRET"] = _TOKEN
        stack.callback(os.environ.pop, "KDKIT_TEST_SECRET", None)
        yield found

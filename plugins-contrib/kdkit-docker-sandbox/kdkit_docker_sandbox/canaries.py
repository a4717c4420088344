"""Small programs that try what the sandbox promises to prevent, each in a container as programs get it.

The flags of docker prove nothing: kernels without a memory controller ignore some of them, and daemons have defaults.
"""

from __future__ import annotations

import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kdkit.api import SandboxCanary, SandboxJob, SandboxLimits, SandboxOutcome
from kdkit_docker_sandbox.docker import NOBODY
from kdkit_docker_sandbox.session import DockerSession

__all__ = ["ISOLATES", "LIMITS", "run_canaries"]

_MIB: Final = 2**20
ISOLATES: Final = ("files", "writes", "network", "processes", "privileges", "programs from each other", "limits")
LIMITS: Final = SandboxLimits(wall_s=6.0, cpu_s=2.0, memory_bytes=256 * _MIB, output_bytes=_MIB, processes=8)
"""What the canaries run under."""

_SHARES_MEMORY: Final = """
import os, time
children = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        kept = bytearray(b"x") * (150 << 20)
        time.sleep(1)
        os._exit(0)
    children.append(pid)
ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
print("killed" if -9 in ends else f"its processes together used 600 MiB: {ends}")
"""
_FORKS: Final = """
import os, time
count = 0
try:
    while count < 64:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        count += 1
except OSError:
    pass
if count >= 64:
    print("started 64 processes")
"""
_READS: Final = """
try:
    with open(input(), "rb") as file:
        print("read a file of the host:", file.read(16))
except OSError:
    pass
"""
_WRITES: Final = """
import os
for place in ("/", "/usr", "/etc", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/run"):
    path = place + "/kdkit-canary"
    try:
        with open(path, "wb") as file:
            file.write(b"x")
        os.unlink(path)
        print("wrote to", place)
    except OSError:
        pass
with open("own", "w") as file:
    file.write("x")
"""
_ENVIRONMENT: Final = "import os; print(*(set(os.environ) - {'PATH', 'LANG', 'OMP_NUM_THREADS', 'TMPDIR', 'LC_CTYPE'}))"
_CONNECTS: Final = """
import socket
try:
    socket.create_connection(("127.0.0.1", int(input())), 1)
    print("connected")
except OSError:
    pass
try:
    # Asks the kernel for a route and sends nothing; the address belongs to nobody.
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9))
    print("has a route")
except OSError:
    pass
"""
_PRIVILEGES: Final = f"""
facts = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
for name, wanted in (("Uid", ["{NOBODY}"] * 4), ("Gid", ["{NOBODY}"] * 4), ("NoNewPrivs", ["1"]), ("Seccomp", ["2"])):
    if facts.get(name, "").split() != wanted:
        print(name, "is", facts.get(name, "").split())
for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
    if int(facts[name], 16):
        print(name, "is", facts[name].strip())
"""
_LOOKS_AT_THE_WATCHER: Final = """
import os
if os.getppid() != 1:
    print("its parent is not the first process")
for name in ("environ", "mem", "maps", "fd/1", "fd/0"):
    try:
        os.close(os.open(f"/proc/{os.getppid()}/{name}", os.O_RDONLY))
        print("opened", name, "of its parent")
    except OSError:
        pass
"""
_LEAVES: Final = "open('left', 'w').close(); print('done')"
_FINDS: Final = "import os; print(*(name for name in os.listdir() if name != 'main.py'), end='')"


@dataclass(frozen=True, slots=True)
class _Canary:
    name: str
    program: str
    judge: Callable[[SandboxOutcome], bool]
    stdin: str = ""


def _is(status: str) -> Callable[[SandboxOutcome], bool]:
    return lambda outcome: outcome.status == status


def _says(text: str) -> Callable[[SandboxOutcome], bool]:
    return lambda outcome: outcome.status == "ok" and outcome.stdout.strip() == text


def run_canaries(session: DockerSession) -> tuple[SandboxCanary, ...]:
    """Run all of them; ``session`` was opened with :data:`LIMITS`."""
    with _secret() as secret, _server() as server:
        found = _try(session, list(_canaries(secret, server)))
        server.settimeout(0)
        with suppress(OSError):
            server.accept()[0].close()
            # This side saw a connection, whatever the program says.
            found.append(SandboxCanary(name="network", passed=False, found="a connection was made"))
    for program, said in ((_LEAVES, "done"), (_FINDS, "")):
        found += _try(session, [_Canary("next program", program, _says(said))])
    return tuple(found)


def _try(session: DockerSession, canaries: list[_Canary]) -> list[SandboxCanary]:
    outcomes = session.run([SandboxJob(program=canary.program, stdin=canary.stdin) for canary in canaries])
    return [_found(canary, outcome) for canary, outcome in zip(canaries, outcomes, strict=True)]


def _canaries(secret: Path, server: socket.socket) -> Iterator[_Canary]:
    # First what says most about a docker that does not work at all.
    yield _Canary("hello", "print(input())", _says("hello"), "hello")
    yield _Canary("privileges", _PRIVILEGES, _says(""))
    yield _Canary("exit code", "raise SystemExit(3)", lambda o: (o.status, o.exit_code) == ("runtime-error", 3))
    yield _Canary("cpu limit", "while True: pass", _is("timeout"))
    yield _Canary("wall limit", "import time; time.sleep(60)", _is("timeout"))
    yield _Canary("memory limit", f"bytearray({1024 * _MIB})", _is("memory"))
    yield _Canary("memory of processes", _SHARES_MEMORY, _one_was_killed)
    yield _Canary("output limit", f"print('x' * {8 * _MIB})", _is("output-limit"))
    yield _Canary("processes", _FORKS, _says(""))
    yield _Canary("files", _READS, _says(""), str(secret))
    yield _Canary("writing", _WRITES, _says(""))
    yield _Canary("environment", _ENVIRONMENT, _says(""))
    yield _Canary("network", _CONNECTS, _says(""), str(server.getsockname()[1]))
    yield _Canary("watcher", _LOOKS_AT_THE_WATCHER, _says(""))


def _one_was_killed(outcome: SandboxOutcome) -> bool:
    """A process, or all of them at once; that it took too long proves nothing."""
    return outcome.status == "memory" or (outcome.status, outcome.stdout) == ("ok", "killed\n")


def _found(canary: _Canary, outcome: SandboxOutcome) -> SandboxCanary:
    passed = canary.judge(outcome)
    said = (outcome.reason or outcome.stdout or outcome.stderr).strip().splitlines()
    detail = "" if passed else f"{outcome.status}: {said[-1][:200] if said else ''}".rstrip(": ")
    return SandboxCanary(name=canary.name, passed=passed, found=detail)


@contextmanager
def _secret() -> Iterator[Path]:
    """A file of this machine that every user may read."""
    with tempfile.TemporaryDirectory(prefix="kdkit-canary-") as name:
        Path(name).chmod(0o755)
        path = Path(name, "secret")
        path.write_text(secrets.token_hex(8), encoding="ascii")
        path.chmod(0o644)
        yield path


@contextmanager
def _server() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(4)
        yield server

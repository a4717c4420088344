"""No sandbox: programs run as the user who runs kdkit. Limits keep a mistake from hurting, not an attack."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Final

from kdkit.api.errors import StageError
from kdkit.api.sandboxes import SandboxJob, SandboxLimits, SandboxOutcome, SandboxReport
from kdkit.plugins.sandboxes import verdicts
from kdkit.plugins.sandboxes.compiler import command, find_compiler
from kdkit.plugins.sandboxes.inside.supervise import OUTPUT
from kdkit.plugins.sandboxes.inside.task import Reply
from kdkit.plugins.sandboxes.session import default_workers, unusable

__all__ = ["UnsafeLocal", "UnsafeSession"]

_STDERR_BYTES: Final = 64 * 2**10
_COMPILE_S: Final = 60.0
# Limits are set by a program of its own: a function between fork and exec is unsafe in a process with threads.
_LIMITED: Final = """
import json, os, resource, sys
for name, value in json.loads(sys.argv[1]).items():
    which = getattr(resource, name)
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(which, (value, hard))
    except (ValueError, OSError):
        pass
os.execv(sys.argv[2], sys.argv[2:])
"""


class UnsafeLocal:
    """Runs everything, isolates nothing. ``auto`` never takes it."""

    name = "unsafe-local"

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or default_workers()

    def probe(self) -> SandboxReport:
        """It always works, and protects from nothing."""
        return SandboxReport(usable=True, isolates=(), reason="isolates nothing: programs can do what you can do")

    def open(self, limits: SandboxLimits, /) -> UnsafeSession:
        """A session; says so on stderr."""
        print("warning: sandbox unsafe-local: programs run as you, without any isolation", file=sys.stderr)
        return UnsafeSession(limits, self._workers)


class UnsafeSession:
    """One process per program, in a directory of its own."""

    def __init__(self, limits: SandboxLimits, workers: int) -> None:
        self._limits = limits
        self._pool = ThreadPoolExecutor(workers)
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._closed = False

    def run(self, jobs: Sequence[SandboxJob], /) -> Sequence[SandboxOutcome]:
        """One outcome per job, in order.

        Raises:
            StageError: The session is closed.
            EnvironmentUnmet: A C++ program, and no compiler.
        """
        if self._closed:
            raise StageError("the sandbox session is closed")
        return list(self._pool.map(self._one, jobs))

    def close(self) -> None:
        """Kill what runs."""
        self._closed = True
        with self._lock:
            for pid in self._running:
                _kill(pid)
        self._pool.shutdown(cancel_futures=True)

    def _one(self, job: SandboxJob) -> SandboxOutcome:
        if problem := unusable(job):
            return SandboxOutcome(status="infra-error", reason=problem)
        with tempfile.TemporaryDirectory(prefix="kdkit-unsafe-", ignore_cleanup_errors=True) as name:
            box = Path(name)
            for file, text in job.files.items():
                (box / file).write_bytes(text.encode(errors="surrogatepass"))
            try:
                if job.language == "cpp":
                    return self._cpp(job, box)
                (box / "main.py").write_bytes(job.program.encode(errors="surrogatepass"))
                return self._run([sys.executable, "-I", "main.py"], job.stdin, box, self._limits)
            except OSError as error:
                return SandboxOutcome(status="infra-error", reason=str(error))

    def _cpp(self, job: SandboxJob, box: Path) -> SandboxOutcome:
        generous = SandboxLimits(wall_s=_COMPILE_S, cpu_s=_COMPILE_S, memory_bytes=2**31, output_bytes=2**26)
        built = self._run(command(find_compiler()), job.program, box, generous)
        if built.status != "ok":
            return SandboxOutcome(status="compile-error", stderr=built.stderr)
        return self._run([str(box / OUTPUT)], job.stdin, box, self._limits)

    def _run(self, argv: Sequence[str], stdin: str, box: Path, limits: SandboxLimits) -> SandboxOutcome:
        bounds = {
            "RLIMIT_CPU": max(1, round(limits.cpu_s + 0.5)),
            "RLIMIT_AS": limits.memory_bytes + 2**26,
            "RLIMIT_FSIZE": limits.output_bytes + 1,
            "RLIMIT_CORE": 0,
        }
        full = [sys.executable, "-I", "-S", "-c", _LIMITED, json.dumps(bounds), *argv]
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin.encode(errors="surrogatepass"))
            given.seek(0)
            reply = self._watch(full, (given, out, err), box, limits.wall_s)
            size = max(os.fstat(out.fileno()).st_size, os.fstat(err.fileno()).st_size)
            tail = os.pread(err.fileno(), _STDERR_BYTES, max(0, os.fstat(err.fileno()).st_size - _STDERR_BYTES))
            status = verdicts.status_of(reply, limits, output_bytes=size, stderr_tail=tail)
            if (
                argv[0] == sys.executable
                and status == "runtime-error"
                and tail.rstrip().rpartition(b"\n")[2].startswith(b"SyntaxError")
            ):
                status = "compile-error"
            text = os.pread(out.fileno(), limits.output_bytes, 0)
        outcome = SandboxOutcome(status=status, exit_code=reply.exit_code, signal=reply.signal, wall_s=reply.wall_s)
        return replace(outcome, stdout=text.decode(errors="replace"), stderr=tail.decode(errors="replace"))

    def _watch(self, argv: Sequence[str], streams: tuple[IO[bytes], ...], box: Path, wall_s: float) -> Reply:
        environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        started = time.monotonic()
        process = subprocess.Popen(
            argv,
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            cwd=box,
            env=environment,
            start_new_session=True,
        )
        with self._lock:
            self._running.add(process.pid)
        late = False
        try:
            process.wait(wall_s)
        except subprocess.TimeoutExpired:
            late = True
        # Whatever it started and left in its process group goes, too.
        _kill(process.pid)
        process.wait()
        with self._lock:
            self._running.discard(process.pid)
        code = process.returncode
        return Reply(
            state="ran",
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            late=late,
            wall_s=time.monotonic() - started,
        )


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)

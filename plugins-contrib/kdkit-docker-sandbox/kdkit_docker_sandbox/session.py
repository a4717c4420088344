"""A session: containers of one program each, some at a time."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import IO, Final

from kdkit.api import EnvironmentUnmet, SandboxJob, SandboxLimits, SandboxOutcome, StageError
from kdkit_docker_sandbox.docker import Docker
from kdkit_docker_sandbox.verdicts import Ended, failed, outcome_of, report_bytes

__all__ = ["DockerSession"]

_START_S: Final = 60.0
"""For docker to start and remove a container."""
_ATTEMPTS: Final = 3
_ERRORS: Final = 16_384
_CHUNK: Final = 65536
_FILES_BYTES: Final = 8 * 2**20
_MAIN: Final = "main.py"


class DockerSession:
    """See :class:`kdkit.api.SandboxSession`.

    Args:
        docker: Where and in what programs run.
        limits: Bounds of every program.
        workers: Containers at a time; None takes one per core.
    """

    def __init__(self, docker: Docker, limits: SandboxLimits, workers: int | None) -> None:
        self._docker, self._limits = docker, limits
        self._pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
        self._lock = threading.Lock()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._closed = False

    def run(self, jobs: Sequence[SandboxJob], /) -> list[SandboxOutcome]:
        """One outcome per job, in order. A failure of docker is tried again twice.

        Raises:
            StageError: The session is closed.
            EnvironmentUnmet: A C++ program.
        """
        if self._closed:
            raise StageError("the sandbox session is closed")
        if any(job.language != "python" for job in jobs):
            hint = "use the sandbox auto, which compiles C++"
            raise EnvironmentUnmet("the sandbox docker runs Python only", where="sandbox docker", hint=hint)
        return list(self._pool.map(self._judge, jobs))

    def close(self) -> None:
        """End all containers; may be called twice."""
        with self._lock:
            self._closed = True
            running = dict(self._running)
        for name, process in running.items():
            self._docker.remove(name)
            process.kill()
        # What waits is not cancelled: it ends as infra-error at once, and whoever asked for it gets an answer.
        self._pool.shutdown()

    def _judge(self, job: SandboxJob) -> SandboxOutcome:
        if problem := _unusable(job):
            return failed(problem)
        outcome = failed("docker was not asked")
        for _ in range(_ATTEMPTS):
            outcome = self._once(job)
            if self._closed:
                # Closing killed the container: that is no verdict.
                return failed("the sandbox session is closed")
            if outcome.status != "infra-error":
                break
        return outcome

    def _once(self, job: SandboxJob) -> SandboxOutcome:
        name = f"kdkit-{secrets.token_hex(8)}"
        told = {"program": job.program, "stdin": job.stdin, "files": dict(job.files), "limits": asdict(self._limits)}
        try:
            process = self._start(name)
        except OSError as error:
            return failed(f"docker does not run: {error.strerror}")
        if process is None:
            return failed("the sandbox session is closed")
        try:
            ended = self._watch(name, process, json.dumps(told).encode())
        finally:
            with self._lock:
                self._running.pop(name, None)
        return outcome_of(ended, self._limits)

    def _start(self, name: str) -> subprocess.Popen[bytes] | None:
        """A container on its way; None once the session is closed."""
        pipe = subprocess.PIPE
        command = self._docker.run(name, self._limits)
        with self._lock:
            if self._closed:
                return None
            # Ctrl-C is for kdkit, which ends the containers itself.
            process = subprocess.Popen(  # noqa: S603 - a list of ours; the program is on its standard input
                command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
            )
            self._running[name] = process
        return process

    def _watch(self, name: str, process: subprocess.Popen[bytes], job: bytes) -> Ended:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        report = _Reader(process.stdout, report_bytes(self._limits))
        errors = _Reader(process.stderr, _ERRORS)
        writer = threading.Thread(target=_write, args=(process.stdin, job), daemon=True)
        writer.start()
        code: int | None = None
        try:
            code = process.wait(self._limits.wall_s + _START_S)
        except subprocess.TimeoutExpired:
            self._docker.remove(name)
            process.kill()
            process.wait()
        writer.join()
        return Ended(code, report.text(), errors.text())


class _Reader:
    """Reads a stream to its end in a thread of its own, and keeps no more than ``limit`` bytes."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream, self._limit, self._kept = stream, limit, bytearray()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._stream:
            while part := os.read(self._stream.fileno(), _CHUNK):
                self._kept += part[: max(0, self._limit - len(self._kept))]

    def text(self) -> bytes:
        """What was kept, once the stream has ended."""
        self._thread.join()
        return bytes(self._kept)


def _write(stream: IO[bytes], job: bytes) -> None:
    # A container that did not start reads nothing.
    with contextlib.suppress(BrokenPipeError), stream:
        stream.write(job)


def _unusable(job: SandboxJob) -> str:
    """Why the files of a job cannot be used; empty when they can."""
    for name in job.files:
        if not name or name in {".", "..", _MAIN} or "/" in name or "\0" in name or len(name.encode()) > 255:
            return f"{name!r} is no name for a file beside the program"
    size = sum(len(text.encode(errors="surrogatepass")) for text in job.files.values())
    return f"files of {size} bytes; at most {_FILES_BYTES}" if size > _FILES_BYTES else ""

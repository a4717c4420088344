"""Runs a stage in a worker process and follows it to its end, whatever that is."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any, Final

import kdkit
from kdkit.api.errors import StageError, Stopped
from kdkit.engine.events import Event, Sink
from kdkit.engine.job import Outcome, StageJob
from kdkit.engine.lock import Lock
from kdkit.engine.stop import StopRequest

__all__ = ["run_worker"]

_POLL_SECONDS: Final = 0.25
_EXIT_SECONDS: Final = 30.0
"""How long a worker may take to exit after it said that it is done."""


def run_worker(job: StageJob, job_file: Path, lock: Lock, emit: Sink, stop: StopRequest) -> Outcome:
    """Run one stage in a process of its own, so that its memory is returned.

    The worker has its own session, so Ctrl-C reaches it only through us. It inherits the lock's file, so the entry
    stays locked while it lives, and it ends when its stdin closes because we died.
    """
    process = _start(job, job_file, lock)
    try:
        with stop.forwarded(first=lambda: _signal(process, signal.SIGTERM), second=lambda: _kill(process)):
            outcome = _Follower(process, job.stage, emit, stop).follow()
    finally:
        _kill(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()
    return outcome or _died(process.returncode, stop)


def _start(job: StageJob, job_file: Path, lock: Lock) -> subprocess.Popen[bytes]:
    root = Path(kdkit.__file__).parent.parent
    # Without -P a file of the current directory called datasets.py would shadow the library.
    safe = ["-P"] if root != Path.cwd() else []
    os.set_inheritable(lock.handle, True)  # noqa: FBT003 - the signature is Python's
    with job.log_file.open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, *safe, "-m", "kdkit.engine.worker", str(job_file), str(lock.handle)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            pass_fds=(lock.handle,),
        )  # fmt: skip


def _signal(process: subprocess.Popen[bytes], signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signum)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the worker and everything it started. Safe while the worker is not reaped: its id is not reused."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


class _Follower:
    """Reads a worker's messages until it is gone."""

    def __init__(self, process: subprocess.Popen[bytes], stage: str, emit: Sink, stop: StopRequest) -> None:
        assert process.stdout is not None
        self._process = process
        self._stage = stage
        self._emit = emit
        self._stop = stop
        self._told = False
        self._pipe = process.stdout.fileno()
        self._rest = b""
        self._outcome: Outcome | None = None
        os.set_blocking(self._pipe, False)

    def follow(self) -> Outcome | None:
        """Pass events on; returns how the stage ended, or None when the worker could not say."""
        deadline = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            while True:
                ready = selector.select(_POLL_SECONDS)
                self._tell()
                ended = self._exited()
                open_pipe = self._read() if ready or ended else True
                # A process that the worker left behind may hold the pipe open, so its end alone is not waited for.
                if ended or not open_pipe:
                    return self._outcome
                if self._outcome is not None:
                    deadline = deadline or monotonic() + _EXIT_SECONDS
                    if monotonic() > deadline:
                        return self._outcome

    def _tell(self) -> None:
        """Say once that the signal arrived; the handler itself must not print."""
        if self._stop.requested() and not self._told:
            self._told = True
            message = "stopping at the next checkpoint; a second signal stops at once"
            self._emit(Event("log", self._stage, {"message": message}))

    def _exited(self) -> bool:
        """Whether the worker is gone, without reaping it."""
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self._process.poll() is not None
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return found is not None

    def _read(self) -> bool:
        """Handle every message there is; False at the end of the pipe."""
        while True:
            try:
                data = os.read(self._pipe, 65536)
            except BlockingIOError:
                return True
            if not data:
                return False
            *lines, self._rest = (self._rest + data).split(b"\n")
            for message in _messages(lines):
                self._handle(message)

    def _handle(self, message: dict[str, Any]) -> None:
        if message["type"] == "outcome":
            self._outcome = Outcome.from_json(message["data"])
        else:
            self._emit(Event(message["type"], message["stage"], message["data"]))


def _messages(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        yield json.loads(line)


def _died(returncode: int, stop: StopRequest) -> Outcome:
    """The outcome of a worker that ended without saying how."""
    if stop.requested():
        return Outcome("stopped", error=Stopped("stopped at once"), exit_code=stop.exit_code)
    hint = None
    if returncode == -signal.SIGKILL:
        what, hint = "the worker was killed (SIGKILL)", "often the system ran out of memory; resume, or use less"
    elif returncode < 0:
        what = f"the worker died of {signal.Signals(-returncode).name}"
    else:
        what = f"the worker ended with status {returncode} and no result"
    return Outcome.of(StageError(what, hint=hint))

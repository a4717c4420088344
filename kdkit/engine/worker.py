"""The process in which one stage runs: ``python -m kdkit.engine.worker JOB.json LOCK_FD``.

Messages to the parent are JSON lines on what was stdout; everything that anyone prints goes to the stage's log.
SIGTERM asks the stage for a checkpoint and an orderly end. When stdin closes the parent is dead, and so are we.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from kdkit.api.errors import KdkitError, StageError
from kdkit.engine.events import Event, utc_now
from kdkit.engine.execute import execute
from kdkit.engine.files import json_line
from kdkit.engine.job import Outcome, StageJob, code_identity
from kdkit.engine.redact import RedactingStream

__all__ = ["main"]


class Channel:
    """The pipe to the parent; safe to use from several threads."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._lock = threading.Lock()

    def emit(self, event: Event) -> None:
        """Send an event."""
        self._send({"type": event.type, "stage": event.stage, "data": event.data})

    def outcome(self, outcome: Outcome) -> None:
        """Send how the stage ended; the last message."""
        self._send({"type": "outcome", "stage": "", "data": outcome.to_json()})

    def _send(self, message: dict[str, Any]) -> None:
        data = (json_line(message) + "\n").encode()
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._handle, data) :]
            except BrokenPipeError:
                _end_group()


def _end_group() -> NoReturn:
    """End this process and everything it started: nobody is left to publish the result."""
    if os.getpgid(0) == os.getpid():  # not when started by hand, from a shell that shares its group
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _watch_parent(handle: int) -> None:
    while os.read(handle, 4096):
        continue
    _end_group()


def _private(handle: int) -> int:
    """A copy of a standard stream that no child process inherits."""
    copy = os.dup(handle)
    os.set_inheritable(copy, False)  # noqa: FBT003 - the signature is Python's
    return copy


def _redirect(log_file: Path) -> None:
    """Send stdout and stderr of this process and its children to the log, and give them an empty stdin."""
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for handle in (log, null):
        os.close(handle)
    for name, number in (("stdout", 1), ("stderr", 2)):
        raw = open(number, "wb", closefd=False)  # noqa: SIM115 - it stays open, and a descriptor is no path
        setattr(sys, name, RedactingStream(raw, encoding="utf-8", errors="replace", line_buffering=True))


def run_job(job: StageJob, channel: Channel, stopping: threading.Event) -> Outcome:
    """Load the plan's recipe and run the stage."""
    from kdkit.recipe import load_recipe

    try:
        recipe = load_recipe(Path(job.recipe))
        if list(job.code) != code_identity(recipe.stages[job.stage]):
            raise StageError(
                "the code of a component changed since the run was planned",
                hint="run again; the stage gets a new key",
            )
    except KdkitError as error:
        return Outcome.of(error)
    return execute(job, recipe, channel.emit, stopping.is_set)


def main(job_file: str, lock: str) -> NoReturn:
    """Run the stage described in ``job_file``, then exit at once."""
    # The lock's file stays open here and is closed for every process started from here.
    os.set_inheritable(int(lock), False)  # noqa: FBT003 - the signature is Python's
    stopping = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stopping.set())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    job = StageJob.read(Path(job_file))
    channel = Channel(_private(1))
    threading.Thread(target=_watch_parent, args=(_private(0),), daemon=True).start()
    _redirect(job.log_file)
    print(f"--- {utc_now()} {'resumed' if job.resumed else 'started'} {job.stage}")
    outcome = run_job(job, channel, stopping)
    channel.outcome(outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    # Exit hooks and threads of libraries can hang; everything that matters is on disk.
    os._exit(int(outcome.exit_code))


if __name__ == "__main__":
    main(*sys.argv[1:])

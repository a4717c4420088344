"""The judge's side of one fork server: starting it, asking it to run something, ending it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, Final

from kdkit.plugins.sandboxes.inside.task import MESSAGE_BYTES, Reply, Task
from kdkit.plugins.sandboxes.jails import Jail, Launch, launcher
from kdkit.plugins.sandboxes.places import SessionDir, private_user

__all__ = ["Worker", "WorkerFailed"]

_START_S: Final = 30.0
_GRACE_S: Final = 10.0
_END_S: Final = 5.0


class WorkerFailed(Exception):
    """The fork server could not be started, died, or did not answer: never the fault of a program's verdict."""


def _start(launch: Launch, errors: IO[bytes], descriptors: tuple[int, ...]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*launcher(), json.dumps(asdict(launch))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env={},
        pass_fds=descriptors,
        start_new_session=True,
    )


class Worker:
    """A running fork server; one program at a time.

    Args:
        jail: How it is confined.
        place: Files of the session.
        slot: Number of the worker within the session.

    Raises:
        WorkerFailed: It did not start; the message has its last words.
    """

    def __init__(self, jail: Jail, place: SessionDir, slot: int) -> None:
        self.runs = 0
        self._init: int | None = None
        info, info_in = os.pipe()
        parent = os.pidfd_open(os.getpid())
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, info)
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._socket.close)
            self._errors = undo.enter_context(tempfile.TemporaryFile())
            try:
                launch = jail.launch(place, slot, private_user(slot), theirs.fileno(), parent, info_in)
                self._process = _start(launch, self._errors, (theirs.fileno(), parent, info_in))
            finally:
                theirs.close()
                os.close(parent)
                os.close(info_in)
            undo.pop_all()
        self._greet(info)

    def _greet(self, info: int) -> None:
        try:
            said = self._receive(_START_S)
            os.set_blocking(info, False)
            with contextlib.suppress(BlockingIOError):
                text = os.read(info, MESSAGE_BYTES)
                if text:
                    self._init = os.pidfd_open(json.loads(text)["child-pid"])
        except (WorkerFailed, OSError, ValueError, KeyError) as error:
            words = self._last_words()
            self.close()
            raise WorkerFailed(f"the fork server did not start: {words or error}") from error
        finally:
            os.close(info)
        if not said:
            words = self._last_words()
            self.close()
            raise WorkerFailed(f"the fork server did not start: {words or 'no message'}")

    def run(self, task: Task, descriptors: Sequence[int]) -> Reply:
        """Run one program to its end.

        Args:
            task: Its limits.
            descriptors: Memory files of stdin, stdout, stderr, the job, and a fifth for some kinds.

        Raises:
            WorkerFailed: The fork server is gone or does not answer; this worker is closed then.
        """
        self.runs += 1
        try:
            socket.send_fds(self._socket, [task.to_json()], list(descriptors))
            message = self._receive(task.wall_s + _GRACE_S)
            if not message:
                raise WorkerFailed(f"the fork server ended: {self._last_words() or 'without a word'}")
        except (OSError, WorkerFailed) as error:
            self.close()
            raise WorkerFailed(str(error)) from error
        return Reply(**json.loads(message))

    def _receive(self, seconds: float) -> bytes:
        self._socket.settimeout(seconds)
        try:
            return self._socket.recv(MESSAGE_BYTES)
        except TimeoutError:
            raise WorkerFailed(f"the fork server did not answer within {seconds:.0f} s") from None
        except ConnectionError as error:
            raise WorkerFailed(f"the fork server is gone: {error.strerror}") from error

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S if self._process.poll() is None else 0)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        """End it and everything it started; may be called twice."""
        self._socket.close()
        if self._init is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            os.close(self._init)
            self._init = None
        elif self._process.poll() is None and not self._ended(_END_S):
            self._process.kill()
        self._process.wait()
        self._errors.close()

    def _ended(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def alive(self) -> bool:
        """It can run another program."""
        if self._process.poll() is not None or self._socket.fileno() < 0:
            return False
        ready, _, _ = select.select([self._socket], [], [], 0)
        return not ready

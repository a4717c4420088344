"""Watches one program from outside of it: time, end, and what it used. The verdict is made of nothing else."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import time
from typing import Literal

from .payload import NO_COMPILE, NO_EXECUTE, READY, become
from .task import Config, Reply, Task

__all__ = ["OUTPUT", "copy_output", "run"]

OUTPUT = "program"
_CHUNK = 2**20


def run(config: Config, task: Task, descriptors: list[int]) -> Reply | None:
    """Start the program, wait for its end, kill what is left.

    Returns:
        None when the judge went away meanwhile; the program is dead then, too.

    Raises:
        OSError: No process could be made.
    """
    readable, writable = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        become(config, task, descriptors, writable)
    os.close(writable)
    late, alone = _wait(config, pid, started + task.wall_s)
    _, status, usage = os.wait4(pid, 0)
    wall = time.monotonic() - started
    # What it had not waited for itself is no part of its own numbers: a compiler's work is done by its children.
    usages = [usage, *_sweep(pid)]
    said = os.read(readable, 16)
    os.close(readable)
    if alone:
        return None
    code = os.waitstatus_to_exitcode(status)
    return Reply(
        state=_state(said),
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        late=late,
        preempted=sum(used.ru_nivcsw for used in usages),
        wall_s=wall,
        cpu_s=sum(used.ru_utime + used.ru_stime for used in usages),
        memory_bytes=max(used.ru_maxrss for used in usages) * 1024,
    )


def _state(said: bytes) -> Literal["ran", "no-compile", "failed"]:
    if not said.startswith(READY) or NO_EXECUTE in said:
        return "failed"
    return "no-compile" if NO_COMPILE in said else "ran"


def _wait(config: Config, pid: int, deadline: float) -> tuple[bool, bool]:
    """Until the program ends; whether it was killed for its time, and whether because the judge is gone."""
    ended = os.pidfd_open(pid)
    poll = select.poll()
    for descriptor in (ended, config.control, config.parent):
        poll.register(descriptor, select.POLLIN)
    seen = [number for number, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
    late = not seen
    if ended not in seen:
        os.kill(pid, signal.SIGKILL)
    os.close(ended)
    return late, not late and ended not in seen


def _sweep(pid: int) -> list[resource.struct_rusage]:
    """Kill what a compiler left behind, a session of its own that the filter lets no process leave; what it used."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    usages = []
    with contextlib.suppress(ChildProcessError):
        while True:
            usages.append(os.wait4(-1, 0)[2])
    return usages


def copy_output(box: str, into: int, limit: int) -> None:
    """Copy what the compiler wrote to the judge's memory file; nothing when it wrote nothing.

    Raises:
        OSError: It cannot be read.
    """
    try:
        source = os.open(f"{box}/{OUTPUT}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        copied = 0
        while copied < limit and (part := os.read(source, min(_CHUNK, limit - copied))):
            copied += os.write(into, part)
    finally:
        os.close(source)

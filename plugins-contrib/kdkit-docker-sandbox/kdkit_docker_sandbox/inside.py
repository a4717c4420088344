"""Runs inside the container as its first process, with the image's Python: starts one program, watches it, and reports.

The program has the same user. It can neither trace this process nor open its descriptors, because this process cannot
be dumped; it cannot kill it, because signals from inside do not reach a first process; and it never holds the stream on
which the report leaves. Needs nothing but the standard library of Python 3.9 or later.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import math
import os
import resource
import select
import signal
import sys
import time
from typing import Any, NoReturn

TAIL_BYTES = 65536
CHUNK = 65536
STEP_S = 0.02
FILE_BYTES = 16 * 2**20
STARTED, NO_COMPILE = b"S", b"C"
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Read the job from standard input, run it, write the report to standard output."""
    # Python makes an exception of it, which the program could raise in here.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    hide()
    job = json.loads(sys.stdin.buffer.read())
    report = run(job, job["limits"])
    sys.stdout.write(json.dumps(report))


def hide() -> None:
    """Let no process of the same user trace this one or look into it."""
    if ctypes.CDLL(None, use_errno=True).prctl(4, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this process can be traced")


class Stream:
    """What the program writes to one of its outputs: all of it up to a limit, or the end of it."""

    def __init__(self, limit: int, *, tail: bool) -> None:
        self.limit, self.tail = limit, tail
        self.text = bytearray()
        self.size = 0
        self.open = True
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def take(self) -> bool:
        """Read a piece; whether there was one."""
        try:
            part = os.read(self.reader, CHUNK) if self.open else b""
        except BlockingIOError:
            return False
        self.open = self.open and bool(part)
        self.size += len(part)
        self.text += part
        if self.tail:
            del self.text[:-TAIL_BYTES]
        else:
            del self.text[self.limit :]
        return bool(part)


def run(job: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """Start the program, keep what it writes, and end it at its limits."""
    for name, text in {**job["files"], "main.py": job["program"]}.items():
        with open(name, "xb") as file:  # noqa: PTH123 - in the current directory
            file.write(text.encode("utf-8", "surrogatepass"))
    given = os.memfd_create("stdin")
    with open(given, "wb", closefd=False) as file:
        file.write(job["stdin"].encode("utf-8", "surrogatepass"))
    os.lseek(given, 0, os.SEEK_SET)
    streams = [Stream(limits["output_bytes"], tail=False), Stream(limits["output_bytes"], tail=True)]
    told, telling = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        become(job["program"], limits, [given, streams[0].writer, streams[1].writer, telling])
    for descriptor in (given, telling, *(stream.writer for stream in streams)):
        os.close(descriptor)
    code, usage, late = watch(pid, streams, limits["output_bytes"], started + limits["wall_s"])
    said = os.read(told, 16)
    return {
        "state": "failed" if not said.startswith(STARTED) else "no-compile" if NO_COMPILE in said else "ran",
        "exit_code": code if code >= 0 else None,
        "signal": -code if code < 0 else None,
        "late": late,
        "output_bytes": max(stream.size for stream in streams),
        "wall_s": time.monotonic() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "memory_bytes": usage.ru_maxrss * 1024,
        "stdout": base64.b64encode(streams[0].text).decode(),
        "stderr": base64.b64encode(streams[1].text).decode(),
    }


def watch(
    pid: int, streams: list[Stream], output_bytes: int, deadline: float
) -> tuple[int, resource.struct_rusage, bool]:
    """Until the program ends; it is killed when it is late or has written too much. Exit code, usage, and late."""
    late = False
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        select.select([stream.reader for stream in streams if stream.open], [], [], STEP_S)
        for stream in streams:
            stream.take()
        late = late or time.monotonic() > deadline
        if late or any(stream.size > output_bytes for stream in streams):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    # What it started may hold its outputs for ever. All of that dies with this process.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for stream in streams:
        while stream.size <= output_bytes and stream.take():
            pass
    return os.waitstatus_to_exitcode(status), usage, late


def become(program: str, limits: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Turn this process into the program. What fails before the first byte of ``telling`` is the sandbox's failure."""
    try:
        os.setsid()
        # Moved out of the way first, so that none is overwritten before it is copied.
        high = [os.dup2(descriptor, 100 + place) for place, descriptor in enumerate(descriptors)]
        for place, descriptor in enumerate(high):
            os.dup2(descriptor, place, inheritable=place < 3)
        os.closerange(4, 4096)
        confine(limits)
        os.write(3, STARTED)
        try:
            compile(program, "main.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            os.write(3, NO_COMPILE)
            os.write(2, f"{type(error).__name__}: {error}\n".encode("utf-8", "backslashreplace"))
            os._exit(1)
        environment = {**ENVIRONMENT, "TMPDIR": os.getcwd()}  # noqa: PTH109
        os.execve(sys.executable, [sys.executable, "-E", "-s", "-B", "main.py"], environment)  # noqa: S606
    finally:
        # Nothing may go on in this process.
        raised = sys.exc_info()[1]
        os.write(2, f"{type(raised).__name__}: {raised}\n".encode("utf-8", "backslashreplace"))
        os._exit(125)


def confine(limits: dict[str, Any]) -> None:
    """Limits of one process; the container has those of all together."""
    # Should the container run out of memory, the program goes first.
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123
        file.write("1000")
    seconds = max(1, math.ceil(limits["cpu_s"]))
    for which, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(which, (soft, hard))
    # The interpreter ignores them, which a program would inherit.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()

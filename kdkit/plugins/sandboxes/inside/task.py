"""What the judge asks for, and what it is told: one small message each way, everything large in memory files.

The fork server reads limits only. Program, input and files lie in memory files that it hands on unread, so that its
memory, which every later program inherits, never contains anything of an earlier one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["MESSAGE_BYTES", "Config", "Reply", "Task", "read_all"]

MESSAGE_BYTES = 4096
_REASON = 400  # characters, of up to six bytes each in JSON


@dataclass(frozen=True)
class Config:
    """How one fork server confines what it starts.

    Attributes:
        namespaces: Each program gets PID, mount and IPC namespaces of its own; otherwise Landlock confines it.
        control: Socket to the judge.
        parent: pidfd of the judge's process.
        box: The program's current directory.
        readable: Directories a program may read where Landlock confines it.
        executable: Directories it may execute from, for compiled programs and compilers.
        processes: Processes and threads of this user that exist apart from the program's.
    """

    namespaces: bool
    control: int
    parent: int
    box: str
    readable: tuple[str, ...]
    executable: tuple[str, ...]
    processes: int

    def to_json(self) -> str:
        """The configuration as a command-line argument."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Task:
    """Limits of one program, and its kind.

    Sent with descriptors of stdin, stdout, stderr and the job's JSON; then of the file to execute (``binary``) or of
    the file that takes the result (``compile``).
    """

    kind: Literal["python", "binary", "compile"]
    cpu_s: float
    wall_s: float
    memory_bytes: int
    output_bytes: int
    file_bytes: int
    processes: int
    stack_bytes: int

    def to_json(self) -> bytes:
        """The message to the fork server."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class Reply:
    """What the process that started the program saw of it; the program cannot write here.

    Attributes:
        state: ``ran``, ``no-compile`` (it is not Python), or ``failed``: the confinement could not be set up.
        exit_code: None when a signal ended it.
        late: It was killed at the wall limit.
        preempted: How often it had to give up a core while it wanted to go on.
    """

    state: Literal["ran", "no-compile", "failed"]
    exit_code: int | None = None
    signal: int | None = None
    late: bool = False
    preempted: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    memory_bytes: int = 0
    reason: str = ""

    def to_json(self) -> bytes:
        """The message to the judge, which is never longer than a message may be."""
        return json.dumps({**asdict(self), "reason": self.reason[:_REASON]}).encode()


def read_all(descriptor: int, limit: int | None = None) -> bytes:
    """The content of a memory file from its start, up to ``limit`` bytes."""
    size = os.fstat(descriptor).st_size
    wanted = size if limit is None else min(size, limit)
    parts: list[bytes] = []
    position = 0
    while position < wanted:
        part = os.pread(descriptor, wanted - position, position)
        if not part:
            break
        parts.append(part)
        position += len(part)
    return b"".join(parts)

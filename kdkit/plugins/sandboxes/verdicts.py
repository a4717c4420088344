"""What a program's end means. Made of what the supervising process and the kernel saw, never of the program's word.

When several things are true the first counts: infra-error, security-violation, compile-error, timeout, memory,
output-limit, runtime-error, ok.
"""

from __future__ import annotations

import signal
from typing import Final, Literal

from kdkit.api.sandboxes import SandboxLimits
from kdkit.plugins.sandboxes.inside.task import Reply

__all__ = ["Status", "starved", "status_of"]

Status = Literal[
    "ok",
    "runtime-error",
    "compile-error",
    "timeout",
    "memory",
    "output-limit",
    "security-violation",
    "infra-error",
]

_NEARLY: Final = 0.95
_PREEMPTED: Final = 10
_SHARE: Final = 0.9


def status_of(reply: Reply, limits: SandboxLimits, *, output_bytes: int, stderr_tail: bytes) -> Status:
    """The verdict.

    Args:
        reply: What the supervisor saw.
        limits: The program's limits.
        output_bytes: Size of the larger one of its two output streams.
        stderr_tail: The end of its standard error. It can only turn one failure into another.
    """
    failed = reply.exit_code != 0
    if reply.state == "failed":
        return "infra-error"
    if reply.signal == signal.SIGSYS:
        return "security-violation"
    if reply.state == "no-compile":
        return "compile-error"
    if reply.late or reply.signal == signal.SIGXCPU or reply.cpu_s > limits.cpu_s:
        return "timeout"
    if failed and (reply.memory_bytes >= _NEARLY * limits.memory_bytes or _out_of_memory(stderr_tail)):
        return "memory"
    if output_bytes > limits.output_bytes or reply.signal == signal.SIGXFSZ:
        return "output-limit"
    return "runtime-error" if failed else "ok"


def _out_of_memory(stderr_tail: bytes) -> bool:
    """Allocation fails at the limit without being used, so that the resident size does not show it."""
    lines = stderr_tail.rstrip().splitlines()
    last = lines[-1] if lines else b""
    return last.startswith(b"MemoryError") or b"std::bad_alloc" in last


def starved(reply: Reply, limits: SandboxLimits) -> bool:
    """Killed at the wall limit while it waited for a core: another try, alone, may tell something else.

    A program that sleeps is hardly ever preempted, and one that got its share has used it.
    """
    return reply.late and reply.preempted >= _PREEMPTED and reply.cpu_s < min(limits.cpu_s, _SHARE * reply.wall_s)

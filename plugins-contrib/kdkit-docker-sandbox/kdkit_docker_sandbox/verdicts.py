"""What a program's end means: made of what the process that watched it and docker say, never of the program's word."""

from __future__ import annotations

import base64
import json
import signal
from dataclasses import dataclass
from typing import Any, Final, Literal

from kdkit.api import SandboxLimits, SandboxOutcome
from kdkit_docker_sandbox.docker import last_line

__all__ = ["Ended", "failed", "outcome_of", "report_bytes"]

_NEARLY: Final = 0.95
_TAIL_BYTES: Final = 65536
_KILLED: Final = 128 + signal.SIGKILL
_SAID: Final = {125: "docker failed", 126: "the image's python3 does not run", 127: "the image has no python3"}


@dataclass(frozen=True, slots=True)
class Ended:
    """How ``docker run`` ended: its exit code, None when it was given up, and what came out of it."""

    code: int | None
    report: bytes
    errors: bytes


def report_bytes(limits: SandboxLimits) -> int:
    """The most that a report can have."""
    return 4 * (limits.output_bytes + _TAIL_BYTES) // 3 + 4096


def failed(reason: str) -> SandboxOutcome:
    """The sandbox failed, not the program."""
    return SandboxOutcome(status="infra-error", reason=reason)


def outcome_of(ended: Ended, limits: SandboxLimits) -> SandboxOutcome:
    """The verdict."""
    if ended.code is None:
        return failed("the container did not end in time")
    if ended.code == _KILLED:
        # Only the kernel, out of the container's memory, or an attack can end the first process.
        return SandboxOutcome(status="memory", signal=int(signal.SIGKILL), stderr="the container was killed")
    try:
        report = json.loads(ended.report) if ended.code == 0 else None
    except ValueError:
        report = None
    if report is None:
        said = last_line(ended.errors) or "it says nothing"
        return failed(f"{_SAID.get(ended.code, f'the container ended with {ended.code}')}: {said}")
    text, tail = (base64.b64decode(report[name]) for name in ("stdout", "stderr"))
    status = _status(report, limits, tail)
    if status == "infra-error":
        return failed(f"the program was not started: {last_line(tail) or 'it says nothing'}")
    return SandboxOutcome(
        status=status,
        stdout=text.decode(errors="replace"),
        stderr=tail.decode(errors="replace"),
        exit_code=report["exit_code"],
        signal=report["signal"],
        wall_s=report["wall_s"],
        cpu_s=report["cpu_s"],
        memory_bytes=report["memory_bytes"],
    )


def _status(
    report: dict[str, Any], limits: SandboxLimits, tail: bytes
) -> Literal[
    "ok",
    "runtime-error",
    "compile-error",
    "timeout",
    "memory",
    "output-limit",
    "security-violation",
    "infra-error",
]:
    """The first that holds."""
    bad = report["exit_code"] != 0
    if report["state"] == "failed":
        return "infra-error"
    if report["signal"] == signal.SIGSYS:
        return "security-violation"
    if report["state"] == "no-compile":
        return "compile-error"
    if report["late"] or report["signal"] == signal.SIGXCPU or report["cpu_s"] > limits.cpu_s:
        return "timeout"
    if bad and (report["memory_bytes"] >= _NEARLY * limits.memory_bytes or _out_of_memory(tail)):
        return "memory"
    if report["output_bytes"] > limits.output_bytes:
        return "output-limit"
    return "runtime-error" if bad else "ok"


def _out_of_memory(tail: bytes) -> bool:
    """The last line of a program whose allocation failed. A program that writes it turns one failure into another."""
    lines = tail.rstrip().splitlines()
    return bool(lines) and lines[-1].startswith(b"MemoryError")

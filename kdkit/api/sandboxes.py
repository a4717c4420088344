"""What runs programs that nobody trusts, and what it says about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """Bounds for one program: wall seconds, CPU seconds, bytes of memory, bytes of output, processes."""

    wall_s: float = 10.0
    cpu_s: float = 5.0
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 2**20
    processes: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxJob:
    """A program with its input."""

    program: str
    language: Literal["python", "cpp"] = "python"
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxOutcome:
    """What happened. ``infra-error`` means that the sandbox failed, not the program.

    Of several statuses that apply, the first counts: infra-error, security-violation, compile-error, timeout, memory,
    output-limit, runtime-error, ok.

    Attributes:
        exit_code: None when a signal ended the program, or when it did not run.
        stderr: The end of its error stream, or what the compiler said.
        memory_bytes: Largest resident size.
        reason: Why the sandbox failed.
    """

    status: Literal[
        "ok",
        "runtime-error",
        "compile-error",
        "timeout",
        "memory",
        "output-limit",
        "security-violation",
        "infra-error",
    ]
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    signal: int | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    memory_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxCanary:
    """One small program that tried what a sandbox promises to prevent, and what came of it."""

    name: str
    passed: bool
    found: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxReport:
    """Whether the sandbox works here, what it isolates, and what to do when it does not."""

    usable: bool
    isolates: tuple[str, ...] = ()
    reason: str = ""
    hint: str = ""
    canaries: tuple[SandboxCanary, ...] = ()


class SandboxSession(Protocol):
    """A warm sandbox."""

    def run(self, jobs: Sequence[SandboxJob], /) -> Sequence[SandboxOutcome]:
        """One outcome per job, in order."""

    def close(self) -> None:
        """End all processes."""


class Sandbox(Protocol):
    """Runs programs that nobody trusts. Fails closed."""

    def probe(self) -> SandboxReport:
        """Try the isolation for real."""

    def open(self, limits: SandboxLimits, /) -> SandboxSession:
        """A warm session; raises ``EnvironmentUnmet`` when the probe fails."""

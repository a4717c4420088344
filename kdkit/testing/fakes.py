"""Stand-ins for tests: a sandbox that runs nothing, and a context to build components in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kdkit.api.sandboxes import SandboxJob, SandboxLimits, SandboxOutcome, SandboxReport

__all__ = ["Behaviour", "FakeBuildContext", "FakeSandbox", "FakeSession"]

Behaviour: TypeAlias = Callable[[SandboxJob], SandboxOutcome | str]
"""What a program does: an outcome, or the text it prints before it ends well."""


class FakeSandbox:
    """A sandbox in which programs are names of behaviours: nothing is ever executed.

    Args:
        programs: Program text, without white space at its ends, to what it does. Others end well and print nothing.
        usable: What the probe says.

    Attributes:
        jobs: Every job that was given, in order.
        opened: Limits of every session that was opened, in order.
        closed: How many sessions were closed.
    """

    def __init__(self, programs: Mapping[str, Behaviour] | None = None, *, usable: bool = True) -> None:
        self.programs = {text.strip(): behaviour for text, behaviour in (programs or {}).items()}
        self.usable = usable
        self.jobs: list[SandboxJob] = []
        self.opened: list[SandboxLimits] = []
        self.closed = 0

    def probe(self) -> SandboxReport:
        """See :class:`kdkit.api.Sandbox`."""
        return SandboxReport(usable=self.usable, reason="" if self.usable else "told to be unusable")

    def open(self, limits: SandboxLimits, /) -> FakeSession:
        """See :class:`kdkit.api.Sandbox`."""
        self.opened.append(limits)
        return FakeSession(self)


class FakeSession:
    """A session of :class:`FakeSandbox`."""

    def __init__(self, sandbox: FakeSandbox) -> None:
        self._sandbox = sandbox

    def run(self, jobs: Sequence[SandboxJob], /) -> list[SandboxOutcome]:
        """See :class:`kdkit.api.SandboxSession`."""
        self._sandbox.jobs += jobs
        return [self._outcome(job) for job in jobs]

    def close(self) -> None:
        """See :class:`kdkit.api.SandboxSession`."""
        self._sandbox.closed += 1

    def _outcome(self, job: SandboxJob) -> SandboxOutcome:
        behaviour = self._sandbox.programs.get(job.program.strip())
        said = behaviour(job) if behaviour is not None else ""
        return SandboxOutcome(status="ok", stdout=said, exit_code=0) if isinstance(said, str) else said


class FakeBuildContext:
    """A ``BuildContext`` and ``LoadContext`` that builds nested components; references become artifacts.

    Args:
        seed: The recipe's seed.

    Attributes:
        lines: What was logged.
    """

    offline = True
    device = "cpu"

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self.lines: list[str] = []

    def resolve(self, ref: Any, /) -> Any:
        """The artifact at the path that the reference names."""
        return ref.artifact(path=Path(str(ref.source)))

    def build(self, component: Any, /, *args: Any) -> Any:
        """Build a nested component."""
        context = (self,) if component.kind in {"reward", "teacher", "rollout"} else ()
        return component.found.spec.build(component.params, *context, *args)

    def precision(self, requested: str, /) -> Literal["bf16", "fp32"]:
        """Always fp32."""
        del requested
        return "fp32"

    def log(self, message: str, /) -> None:
        """Keep a line."""
        self.lines.append(message)

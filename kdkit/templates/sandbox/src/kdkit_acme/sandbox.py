"""Where programs run that nobody trusts: in another sandbox, once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from kdkit.api import EnvironmentUnmet

if TYPE_CHECKING:
    from kdkit.api import (
        Sandbox,
        SandboxJob,
        SandboxLimits,
        SandboxOutcome,
        SandboxReport,
        SandboxSession,
    )

Key: TypeAlias = tuple[str, str, str, tuple[tuple[str, str], ...]]

# What a busy machine may change, such as a timeout, is tried again.
_LASTING = frozenset({"ok", "runtime-error", "compile-error"})
_LONGEST = 64 * 1024


class AcmeSandbox:
    """Isolates as well as the sandbox behind it, no better and no worse.

    Args:
        inner: The sandbox behind it.
        remember: Outcomes that a session remembers.
    """

    def __init__(self, inner: Sandbox, remember: int) -> None:
        self._inner = inner
        self._remember = remember

    def probe(self) -> SandboxReport:
        """Whether the sandbox behind it works here."""
        return self._inner.probe()

    def open(self, limits: SandboxLimits, /) -> SandboxSession:
        """A session.

        Raises:
            EnvironmentUnmet: The sandbox behind it does not work here.
        """
        report = self.probe()
        if not report.usable:
            raise EnvironmentUnmet(report.reason, hint=report.hint or None)
        session = self._inner.open(limits)
        return AcmeSession(session, self._remember)


class AcmeSession:
    """A session with a memory of its own.

    Args:
        inner: A session of the sandbox behind it.
        remember: Outcomes that are remembered.
    """

    def __init__(self, inner: SandboxSession, remember: int) -> None:
        self._inner = inner
        self._remember = remember
        self._known: OrderedDict[Key, SandboxOutcome] = OrderedDict()

    def run(self, jobs: Sequence[SandboxJob], /) -> Sequence[SandboxOutcome]:
        """One outcome per job, in order; the same program with the same input runs once."""
        keys = [_key(job) for job in jobs]
        new = {key: job for key, job in zip(keys, jobs, strict=True) if key not in self._known}
        # Asked even when nothing is new: a session that is closed has to say so.
        ran = dict(zip(new, self._inner.run(list(new.values())), strict=True))
        found = [ran[key] if key in ran else self._known[key] for key in keys]
        for key, outcome in ran.items():
            if outcome.status in _LASTING and len(outcome.stdout + outcome.stderr) <= _LONGEST:
                self._known[key] = outcome
        while len(self._known) > self._remember:
            self._known.popitem(last=False)
        return found

    def close(self) -> None:
        """End all processes."""
        self._inner.close()


def _key(job: SandboxJob) -> Key:
    return job.program, job.language, job.stdin, tuple(sorted(job.files.items()))

"""The sandboxes that recipes name: one kind of jail each, or the best that works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kdkit.api.errors import EnvironmentUnmet
from kdkit.api.sandboxes import SandboxLimits, SandboxReport
from kdkit.plugins.sandboxes.jails import BubblewrapJail, Jail, LandlockJail
from kdkit.plugins.sandboxes.probe import probe, remembered
from kdkit.plugins.sandboxes.session import Session, default_workers

__all__ = ["AutoSandbox", "JailSandbox", "auto", "bubblewrap", "landlock"]


class JailSandbox:
    """One kind of jail.

    Args:
        jail: How programs are confined.
        workers: Programs at a time; None takes one per core.
    """

    def __init__(self, jail: Jail, workers: int | None = None) -> None:
        self.name = jail.name
        self._jail = jail
        self._workers = workers or default_workers()

    def probe(self) -> SandboxReport:
        """Run the canaries."""
        return probe(self._jail, self._workers)

    def known(self) -> SandboxReport:
        """The report of this boot's probe, which runs when there was none."""
        return remembered(self._jail) or self.probe()

    def open(self, limits: SandboxLimits, /) -> Session:
        """A warm session.

        Raises:
            EnvironmentUnmet: A canary died; names it and what to do.
        """
        report = self.known()
        if not report.usable:
            raise EnvironmentUnmet(report.reason, where=f"sandbox {self.name}", hint=report.hint or None)
        return Session(self._jail, limits, self._workers)


class AutoSandbox:
    """The first of some sandboxes that works. Chosen when the first session is opened, and never changed afterwards."""

    name = "auto"

    def __init__(self, candidates: Sequence[JailSandbox]) -> None:
        self._candidates = candidates
        self._taken: JailSandbox | None = None

    def probe(self) -> SandboxReport:
        """The report of the first candidate that works; of all of them in one line when none does."""
        return self._first(lambda candidate: candidate.probe())[1]

    def known(self) -> SandboxReport:
        """As :meth:`probe`, with what this boot's probes have found."""
        return self._first(lambda candidate: candidate.known())[1]

    def open(self, limits: SandboxLimits, /) -> Session:
        """A warm session of the best sandbox that works here; later ones are of the same.

        Raises:
            EnvironmentUnmet: None does; names each with its dead canary and what to do. Or the one that was taken
                before has stopped working: nothing weaker takes its place then.
        """
        if self._taken is None:
            self._taken, report = self._first(lambda candidate: candidate.known())
            if self._taken is None:
                raise EnvironmentUnmet(report.reason, where="sandbox auto", hint=report.hint)
        return self._taken.open(limits)

    def _first(self, ask: Callable[[JailSandbox], SandboxReport]) -> tuple[JailSandbox | None, SandboxReport]:
        reports = []
        for candidate in self._candidates:
            report = ask(candidate)
            if report.usable:
                return candidate, replace(report, reason=f"uses {candidate.name}")
            reports.append((candidate.name, report))
        return None, _none_of(reports)


def _none_of(reports: Sequence[tuple[str, SandboxReport]]) -> SandboxReport:
    reasons = "; ".join(f"{name}: {report.reason} ({report.hint})" for name, report in reports)
    return SandboxReport(
        usable=False,
        reason=f"no sandbox works here: {reasons}",
        hint="kdkit sandbox check shows every canary; nothing weaker is taken by itself",
    )


def bubblewrap(workers: int | None) -> JailSandbox:
    """Namespaces made by bwrap."""
    return JailSandbox(BubblewrapJail(), workers)


def landlock(workers: int | None) -> JailSandbox:
    """Landlock, for containers."""
    return JailSandbox(LandlockJail(), workers)


def auto(workers: int | None) -> AutoSandbox:
    """The stronger one first."""
    return AutoSandbox([bubblewrap(workers), landlock(workers)])

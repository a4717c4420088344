"""Does a sandbox hold what it promises, and tell what a program did from what it did not?

Subclass :class:`SandboxConformance` in a test file and run pytest:

    class TestMine(SandboxConformance):
        def build(self):
            return build_mine(MineParams())

Where the sandbox does not work the suite is skipped, with its reason; ``KDKIT_REQUIRE_SANDBOX=1`` makes that a failure.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final

import pytest

from kdkit.api.errors import EnvironmentUnmet, KdkitError
from kdkit.api.sandboxes import Sandbox, SandboxJob, SandboxOutcome, SandboxReport, SandboxSession
from kdkit.testing.conformance.checks import one_line
from kdkit.testing.programs import HONEST, LIMITS, Language, hostile_host, hostile_programs, wrong

__all__ = ["SandboxConformance"]

_STATUSES: Final = frozenset(
    ("ok", "runtime-error", "compile-error", "timeout", "memory", "output-limit", "security-violation", "infra-error")
)
_PLAIN: Final = (
    (SandboxJob(program="print('naïve', input())", stdin="café\n"), "ok", "naïve café\n"),
    (SandboxJob(program="print(open('given.txt').read())", files={"given.txt": "a\nb"}), "ok", "a\nb\n"),
    (SandboxJob(program=""), "ok", ""),
    (SandboxJob(program="print('before')\n1 / 0"), "runtime-error", "before\n"),
    (SandboxJob(program="raise SystemExit(3)"), "runtime-error", ""),
    (SandboxJob(program="def f(:"), "compile-error", ""),
    (SandboxJob(program="while True: pass"), "timeout", ""),
    (SandboxJob(program="x = bytearray(10 << 30)"), "memory", ""),
)
_LEAVES: Final = "import os\nopen('left.txt', 'w').write('x')\nfor p in ('/tmp/left', '/dev/shm/left'):\n try: open(p, 'w')\n except OSError: pass"  # noqa: E501
_LOOKS: Final = "import os\nprint([p for p in ('left.txt', '/tmp/left', '/dev/shm/left') if os.path.exists(p)])"
_SUBREAPER: Final = 36
_PATIENCE: Final = 10.0


class SandboxConformance:
    """What every sandbox must fulfil.

    Attributes:
        languages: What it runs.
        verdicts: Hostile programs of :mod:`kdkit.testing.programs` that get another verdict here, by name. Printing
            what they must not find and doing harm stay forbidden to them.
        spares: Names of hostile programs that prove nothing about this sandbox, such as those that start a process
            where programs may; say why in a comment.
    """

    languages: ClassVar[tuple[Language, ...]] = ("python",)
    verdicts: ClassVar[Mapping[str, str]] = {}
    spares: ClassVar[frozenset[str]] = frozenset()

    def build(self) -> Sandbox:
        """The sandbox under test."""
        raise NotImplementedError

    def build_unusable(self) -> Sandbox | None:
        """The sandbox on a machine where it cannot isolate: its tool is missing, or a canary gets out."""
        return None

    def left(self) -> list[str]:
        """What is still running of this sandbox that is no child of this process, such as containers."""
        return []

    # -- helpers

    @contextmanager
    def _session(self) -> Iterator[SandboxSession]:
        """A session with the limits that the verdicts are about."""
        opened = self._working().open(LIMITS)
        try:
            yield opened
        finally:
            opened.close()

    def _working(self) -> Sandbox:
        sandbox = self.build()
        report = sandbox.probe()
        if not report.usable:
            if os.environ.get("KDKIT_REQUIRE_SANDBOX"):
                pytest.fail(f"the sandbox does not work here: {report.reason}")
            pytest.skip(f"the sandbox does not work here: {report.reason}")
        return sandbox

    def _valid(self, outcome: SandboxOutcome, what: str) -> None:
        assert isinstance(outcome, SandboxOutcome), f"{what}: {type(outcome).__name__} is no SandboxOutcome"
        assert outcome.status in _STATUSES, f"{what}: there is no status {outcome.status!r}"
        assert outcome.exit_code is None or outcome.signal is None, f"{what}: an exit code and a signal"
        assert outcome.status != "ok" or outcome.exit_code == 0, f"{what}: ok with exit code {outcome.exit_code}"
        assert outcome.status != "infra-error" or outcome.reason, f"{what}: infra-error without a reason"
        assert min(outcome.wall_s, outcome.cpu_s, outcome.memory_bytes) >= 0, f"{what}: a negative measure"

    # -- the contract

    def test_the_probe_tries_it(self) -> None:
        """Canaries that all lived and names of what is isolated, or a reason why not."""
        report = self.build().probe()
        assert isinstance(report, SandboxReport), f"{type(report).__name__} is no SandboxReport"
        if not report.usable:
            assert report.reason, "the sandbox is unusable without a reason"
            pytest.skip(f"the sandbox does not work here: {report.reason}")
        assert report.canaries, "the probe tried nothing: give the canaries that it ran"
        assert report.isolates, "the probe says nothing that is isolated"
        dead = [canary.name for canary in report.canaries if not canary.passed]
        assert not dead, f"usable although canaries died: {', '.join(dead)}"

    def test_it_fails_closed(self) -> None:
        """Where it cannot isolate, nothing runs."""
        sandbox = self.build_unusable()
        if sandbox is None:
            pytest.skip("build_unusable gives none")
        report = sandbox.probe()
        assert not report.usable, "the probe says usable"
        assert report.reason, "the sandbox is unusable without a reason"
        try:
            session = sandbox.open(LIMITS)
        except EnvironmentUnmet as error:
            one_line(error, "a sandbox that cannot isolate")
            return
        session.close()
        raise AssertionError("a sandbox that cannot isolate was opened")

    def test_verdicts_of_plain_programs(self) -> None:
        """Input, files, output and the end of programs are told as they were."""
        flood = SandboxJob(program=f"print('x' * {2 * LIMITS.output_bytes})")
        with self._session() as session:
            *outcomes, output = session.run([*(job for job, *_ in _PLAIN), flood])
        for (job, status, stdout), outcome in zip(_PLAIN, outcomes, strict=True):
            what = f"the program {job.program!r}"
            self._valid(outcome, what)
            assert outcome.status == status, f"{what}: {outcome.status}, not {status}: {outcome.stderr[-200:]}"
            assert outcome.stdout == stdout, f"{what} printed {outcome.stdout!r}, not {stdout!r}"
        assert output.status == "output-limit", f"too much output: {output.status}"
        assert len(output.stdout) <= LIMITS.output_bytes, f"{len(output.stdout)} characters of output were kept"

    def test_an_outcome_for_every_job_in_order(self) -> None:
        """However long each of them takes."""
        delay = "import sys, time\nn = int(input())\ntime.sleep(0.3 if n % 3 == 0 else 0)\nprint(n)"
        with self._session() as session:
            outcomes = session.run([SandboxJob(program=delay, stdin=str(n)) for n in range(9)])
            none = list(session.run([]))
        assert [outcome.stdout for outcome in outcomes] == [f"{n}\n" for n in range(9)], "outcomes are out of order"
        assert none == [], "no jobs have outcomes"

    def test_programs_do_not_see_each_other(self) -> None:
        """What one leaves is gone before the next one looks."""
        with self._session() as session:
            outcomes = [session.run([SandboxJob(program=program)])[0] for program in (_LEAVES, _LOOKS, _LEAVES, _LOOKS)]
        for outcome in outcomes[1::2]:
            assert outcome.stdout == "[]\n", f"a program sees what another one left: {outcome.stdout.strip()}"

    def test_hostile_python_programs_get_their_verdict_and_nothing_else(self) -> None:
        """Each gets its verdict, the program after it too, and the host is unharmed."""
        self._hostile("python")

    def test_hostile_cpp_programs_get_their_verdict_and_nothing_else(self) -> None:
        """The same for programs that are compiled, and for what they do to the compiler."""
        self._hostile("cpp")

    def _hostile(self, language: Language) -> None:
        if language not in self.languages:
            pytest.skip(f"it does not run {language}")
        sandbox, programs = self._working(), [p for p in hostile_programs(language) if p.name not in self.spares]
        problems: list[str] = []
        with hostile_host() as host:
            session = sandbox.open(LIMITS)
            try:
                jobs = [job for program in programs for job in (host.job(program), HONEST[language])]
                outcomes = session.run(jobs)
            finally:
                session.close()
            for program, outcome, after in zip(programs, outcomes[::2], outcomes[1::2], strict=True):
                expected = replace(program, status=self.verdicts.get(program.name, program.status))
                problems += wrong(expected, outcome)
                if (after.status, after.stdout) != ("ok", "42\n"):
                    problems.append(f"after {program.name}: {after.status} {after.stdout!r} {after.reason}")
            problems += host.harm()
        assert not problems, "\n".join(problems)

    def test_nothing_is_left_running(self) -> None:
        """Neither of a session that was closed nor of programs that detach themselves."""
        sandbox = self._working()
        with _adopting() as children:
            session = sandbox.open(LIMITS)
            detach = "import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(600)"
            session.run([SandboxJob(program=program) for program in (detach, "print(1)")])
            session.close()
            left = _wait_for_none(lambda: [*_running(children), *self.left()])
        assert not left, f"still running: {', '.join(left)}"

    def test_a_closed_session_runs_nothing(self) -> None:
        """It may be closed twice; what it is given afterwards is an error, not a program that runs elsewhere."""
        session = self._working().open(LIMITS)
        session.close()
        session.close()
        try:
            outcomes = session.run([HONEST["python"]])
        except KdkitError as error:
            one_line(error, "a closed session")
        else:
            assert [outcome.status for outcome in outcomes] == ["infra-error"], "a closed session runs programs"


@contextmanager
def _adopting() -> Iterator[set[int]]:
    """Orphans of this process's children become its own children, so that no daemon can hide; yields those before."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield set(_children())
    finally:
        libc.prctl(_SUBREAPER, 0, 0, 0, 0)


def _wait_for_none(found: Callable[[], list[str]]) -> list[str]:
    """What is still found after some patience: what was killed takes a moment to be gone."""
    deadline = time.monotonic() + _PATIENCE
    while (left := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _running(before: set[int]) -> list[str]:
    return [f"{name} ({pid})" for pid, name in _children().items() if pid not in before]


def _children() -> dict[int, str]:
    """Children of this process that run, with their names; those that ended and were not waited for do not."""
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            head, _, tail = (path / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
        except OSError:
            continue
        state, parent = tail.split()[:2]
        if int(parent) == os.getpid() and state != "Z":
            found[int(path.name)] = head.partition("(")[2]
    return found

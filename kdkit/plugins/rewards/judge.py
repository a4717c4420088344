"""Runs programs on tests in a sandbox and says how they did. Expected outputs never enter the program's jail."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal
from weakref import finalize

from kdkit.api.errors import ConformanceError, EnvironmentUnmet, KdkitError
from kdkit.api.sandboxes import Sandbox, SandboxJob, SandboxLimits, SandboxOutcome, SandboxSession
from kdkit.plugins.rewards.compare import compare
from kdkit.plugins.rewards.problems import OutputTest, Problem
from kdkit.plugins.rewards.verdicts import Verdict, of_outcome, worst

__all__ = ["CHECKER_LIMITS", "RUN_CHECKER", "Judge", "Judgement", "Submission"]

_RETRIES: Final = 2
_SESSIONS: Final = 4
_REMEMBERED: Final = 4096
_CHUNK: Final = 64
"""Jobs given to the sandbox at once: as many outputs are in memory."""
_FILE_BYTES: Final = 8 * 2**20
"""What a sandbox takes as files beside a program, in all."""
_TIMEOUTS: Final = 2
"""After so many time-outs the remaining tests of a program count as failed: each costs seconds."""
CHECKER_LIMITS: Final = SandboxLimits(wall_s=21.0, cpu_s=10.0, output_bytes=2**16)
RUN_CHECKER: Final = (
    "import runpy, sys\n"
    "sys.argv = ['checker.py', 'input.txt', 'expected_output.txt', 'output.txt']\n"
    "runpy.run_path('checker.py', run_name='__main__')\n"
)
"""The program of a checker's job: it calls ``checker.py`` with the names of the three files beside it."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A program for a problem; ``stop_early`` when one failed test settles it."""

    program: str
    problem: Problem
    stop_early: bool

    @property
    def key(self) -> str:
        """Equal for what gets equal verdicts."""
        program = self.program.encode("utf-8", "surrogatepass")
        return hashlib.sha256(self.problem.digest.encode() + program).hexdigest()


@dataclass(frozen=True, slots=True)
class Judgement:
    """How a program did.

    Attributes:
        verdict: The gravest over the tests that were run.
        passed: Tests passed.
        total: Tests of the problem.
        whole: Nothing is left out because one failure was enough.
        reason: Why the judge failed, for IE.
    """

    verdict: Verdict
    passed: int
    total: int
    whole: bool
    reason: str = ""


@dataclass(slots=True)
class _Run:
    """A submission under way."""

    submission: Submission
    verdicts: list[Verdict] = field(default_factory=list)
    reason: str = ""

    @property
    def total(self) -> int:
        return len(self.submission.problem.tests)

    @property
    def settled(self) -> bool:
        done = self.verdicts
        if len(done) == self.total or Verdict.IE in done or Verdict.CE in done or Verdict.SV in done:
            return True
        if self.submission.stop_early:
            return any(verdict is not Verdict.AC for verdict in done)
        return done.count(Verdict.TLE) >= _TIMEOUTS

    def wave(self) -> range:
        """The tests to run next: one, one, two, four, ... so that a bad program wastes few."""
        done = len(self.verdicts)
        return range(done, min(self.total, done + max(1, done)))

    def judgement(self) -> Judgement:
        skipped = self.submission.stop_early and len(self.verdicts) < self.total
        return Judgement(worst(self.verdicts), self.verdicts.count(Verdict.AC), self.total, not skipped, self.reason)


def _job(submission: Submission, index: int) -> SandboxJob:
    test = submission.problem.tests[index]
    if isinstance(test, OutputTest):
        return SandboxJob(program=submission.program, language=submission.problem.language, stdin=test.given)
    return test.job(submission.program)


def _checker_job(problem: Problem, index: int, output: str) -> SandboxJob | Verdict | None:
    """The job of the problem's checker; None where it has none, OLE for an output that no checker can be given.

    That is the fault of the output where an output as long as the expected one would do: else a program could end every
    judgement of itself as a failure of the judge, by writing enough.
    """
    test = problem.tests[index]
    if problem.checker is None or not isinstance(test, OutputTest):
        return None
    files = {"checker.py": problem.checker, "input.txt": test.given, "expected_output.txt": test.expected}
    given, expected, written = sum(map(_bytes, files.values())), _bytes(test.expected), _bytes(output)
    if given + expected <= _FILE_BYTES < given + written:
        return Verdict.OLE
    return SandboxJob(program=RUN_CHECKER, files={**files, "output.txt": output})


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


class Judge:
    """A warm sandbox with a memory for programs that were judged before.

    Several rewards can share one judge, and so a program is run once for all of them.

    Args:
        sandbox: Where programs and checkers run.
        mode: How outputs are compared; see :func:`kdkit.plugins.rewards.compare.compare`.
        tolerance: Of numbers.
    """

    def __init__(self, sandbox: Sandbox, *, mode: Literal["tokens", "exact"], tolerance: float) -> None:
        self._sandbox = sandbox
        self._mode: Literal["tokens", "exact"] = mode
        self._tolerance = tolerance
        self._sessions: OrderedDict[SandboxLimits, SandboxSession] = OrderedDict()
        self._known: OrderedDict[str, Judgement] = OrderedDict()
        finalize(self, _close_all, self._sessions)

    def judge(self, submissions: Sequence[Submission]) -> list[Judgement]:
        """One judgement per submission, in order; equal programs for equal problems are run once.

        Raises:
            EnvironmentUnmet: The sandbox cannot be opened.
            ConformanceError: It gave another number of outcomes than it had jobs.
        """
        answers: dict[str, Judgement] = {}
        runs: dict[str, _Run] = {}
        for submission in submissions:
            key = submission.key
            known = self._known.get(key)
            if known is not None and (known.whole or submission.stop_early):
                self._known.move_to_end(key)
                answers[key] = known
            elif key not in runs or runs[key].submission.stop_early:
                # Of two with the same program the one that wants all tests answers both.
                runs[key] = _Run(submission)
        self._finish(list(runs.values()))
        for key, run in runs.items():
            answers[key] = run.judgement()
            if answers[key].verdict is not Verdict.IE:
                self._remember(key, answers[key])
        return [answers[submission.key] for submission in submissions]

    def close(self) -> None:
        """End all sandboxes; the next judgement opens them again."""
        _close_all(self._sessions)

    def _remember(self, key: str, judgement: Judgement) -> None:
        self._known[key] = judgement
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def _finish(self, runs: Sequence[_Run]) -> None:
        while pending := [run for run in runs if not run.settled]:
            by_limits: dict[SandboxLimits, list[tuple[_Run, int]]] = {}
            for run in pending:
                tests = by_limits.setdefault(run.submission.problem.limits, [])
                tests += [(run, index) for index in run.wave()]
            for limits, tests in by_limits.items():
                for start in range(0, len(tests), _CHUNK):
                    self._judge_tests(limits, tests[start : start + _CHUNK])

    def _judge_tests(self, limits: SandboxLimits, tests: Sequence[tuple[_Run, int]]) -> None:
        """Append the verdicts of some tests to their runs, in the order of the tests."""
        jobs = [_job(run.submission, index) for run, index in tests]
        outcomes = self._run(limits, jobs)
        verdicts = [of_outcome(outcome) for outcome in outcomes]
        checked = self._check(
            [(*tests[i], jobs[i], outcomes[i].stdout) for i, verdict in enumerate(verdicts) if verdict is None]
        )
        for (run, _), outcome, verdict in zip(tests, outcomes, verdicts, strict=True):
            final, reason = next(checked) if verdict is None else (verdict, _reason(outcome))
            run.verdicts.append(final)
            if final is Verdict.IE:
                run.reason = run.reason or " ".join(reason.split())[:200] or "the sandbox failed"

    def _check(self, written: Sequence[tuple[_Run, int, SandboxJob, str]]) -> Iterator[tuple[Verdict, str]]:
        """Verdicts on outputs, with the reason of a failure of the judge."""
        checkers = [_checker_job(run.submission.problem, index, output) for run, index, _, output in written]
        jobs = [checker for checker in checkers if isinstance(checker, SandboxJob)]
        said = iter(self._run(CHECKER_LIMITS, jobs) if jobs else ())
        for checker, (run, index, job, output) in zip(checkers, written, strict=True):
            test = run.submission.problem.tests[index]
            if isinstance(checker, SandboxJob):
                yield _checked(next(said))
            elif checker is not None:
                yield checker, ""
            elif isinstance(test, OutputTest):
                yield compare(test.expected, output, mode=self._mode, tolerance=self._tolerance), ""
            else:
                tolerance = self._tolerance if self._mode == "tokens" else 0.0
                yield test.verdict(job, output, tolerance=tolerance), ""

    def _run(self, limits: SandboxLimits, jobs: Sequence[SandboxJob]) -> list[SandboxOutcome]:
        """Outcomes of jobs; what failed for reasons of the sandbox has two more tries, each in a new one."""
        outcomes = self._run_once(limits, jobs)
        for _ in range(_RETRIES):
            failed = [index for index, outcome in enumerate(outcomes) if of_outcome(outcome) is Verdict.IE]
            if not failed:
                break
            self._drop(limits)
            for index, again in zip(failed, self._run_once(limits, [jobs[i] for i in failed]), strict=True):
                outcomes[index] = again
        return outcomes

    def _run_once(self, limits: SandboxLimits, jobs: Sequence[SandboxJob]) -> list[SandboxOutcome]:
        session = self._session(limits)
        try:
            outcomes = list(session.run(jobs))
        except EnvironmentUnmet:
            raise
        except (KdkitError, OSError) as error:
            return [SandboxOutcome(status="infra-error", stderr=str(error))] * len(jobs)
        if len(outcomes) != len(jobs):
            raise ConformanceError(f"{len(outcomes)} outcomes for {len(jobs)} jobs", where=type(session).__name__)
        return outcomes

    def _session(self, limits: SandboxLimits) -> SandboxSession:
        if limits not in self._sessions:
            while len(self._sessions) >= _SESSIONS:
                self._sessions.popitem(last=False)[1].close()
            self._sessions[limits] = self._sandbox.open(limits)
        self._sessions.move_to_end(limits)
        return self._sessions[limits]

    def _drop(self, limits: SandboxLimits) -> None:
        if (session := self._sessions.pop(limits, None)) is not None:
            session.close()


def _close_all(sessions: OrderedDict[SandboxLimits, SandboxSession]) -> None:
    while sessions:
        sessions.popitem()[1].close()


def _reason(outcome: SandboxOutcome) -> str:
    """Why a sandbox failed; the error stream, which may be the program's, only where it does not say."""
    return getattr(outcome, "reason", "") or outcome.stderr


def _checked(outcome: SandboxOutcome) -> tuple[Verdict, str]:
    """What a checker says: a number of at least 1 as its last word, or exit code 0 without a word, accepts.

    Exit code 1 is a wrong answer, 2 wrong white space, as checkers made with testlib have it. Anything else, such as a
    checker that takes too long, is a failure of the judge.
    """
    said = outcome.stdout.split()
    if outcome.status == "ok" and outcome.exit_code in (None, 0):
        if not said:
            return Verdict.AC, ""
        try:
            return (Verdict.AC if float(said[-1]) >= 1 else Verdict.WA), ""
        except ValueError:
            return Verdict.IE, f"the checker says {said[-1][:40]!r}"
    if outcome.status in ("ok", "runtime-error") and outcome.exit_code in (1, 2):
        return (Verdict.WA if outcome.exit_code == 1 else Verdict.PE), ""
    return Verdict.IE, f"the checker failed: {outcome.status}"

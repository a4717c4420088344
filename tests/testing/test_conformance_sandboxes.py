"""The built-in sandboxes keep the contract, and the suite catches sandboxes that do not.

The wrong ones run only what the suite wrote itself; hostile programs they pretend to have run.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))

from hostile_run import leftovers
from sandbox_helpers import need
from suites import check, checks_of, variant

from kdkit.api import EnvironmentUnmet, SandboxCanary, SandboxOutcome, SandboxReport
from kdkit.plugins.sandboxes.jails import LandlockJail
from kdkit.plugins.sandboxes.providers import JailSandbox, bubblewrap, landlock
from kdkit.plugins.sandboxes.unsafe import UnsafeLocal
from kdkit.testing.conformance import SandboxConformance
from kdkit.testing.programs import EXACT, HONEST, hostile_programs

COMPILER = shutil.which("g++", path="/usr/bin")


class NoJail(LandlockJail):
    """Needs a tool that nobody has."""

    name = "no-jail"

    def check(self):
        raise EnvironmentUnmet("jailer is not installed", hint="install jailer")


class BuiltIn(SandboxConformance):
    languages = ("python", "cpp") if COMPILER else ("python",)

    @pytest.fixture(autouse=True)
    def _works(self):
        need(self.name)
        self.before = leftovers()

    def build_unusable(self):
        return JailSandbox(NoJail(), 2)

    def left(self):
        """As root, processes of users of its own, which the kernel may still show after their parents ended."""
        return sorted(leftovers() - self.before)


class TestBubblewrap(BuiltIn):
    name = "bubblewrap"

    def build(self):
        return bubblewrap(2)


class TestLandlock(BuiltIn):
    name = "landlock"

    def build(self):
        return landlock(2)


# -- wrong sandboxes


@cache
def bank():
    """Programs, those with holes as expressions, and the outcome that each has to have."""
    found = []
    for program in (*hostile_programs("python"), *hostile_programs("cpp")):
        holes = re.escape(program.source).replace("@SECRET@", ".*?").replace("@PRIVATE@", ".*?")
        code, signal = EXACT.get(program.name, (0 if program.status == "ok" else 1, None))
        outcome = SandboxOutcome(status=program.status, exit_code=code, signal=signal, reason="as told")
        found.append((program, re.compile(holes, re.DOTALL), outcome))
    return found


class Session:
    """Runs what is harmless, and pretends the rest."""

    def __init__(self, limits):
        self.real = UnsafeLocal(2).open(limits)

    def run(self, jobs):
        return [self.outcome(job) for job in jobs]

    def outcome(self, job):
        for program, text, outcome in bank():
            if text.fullmatch(job.program):
                return self.hostile(program, job, outcome)
        if "os.fork()" in job.program:
            return SandboxOutcome(status="runtime-error", exit_code=1)
        if job.language == "cpp":
            return self.honest(job)
        return self.plain(job)

    def hostile(self, program, job, outcome):
        return outcome

    def honest(self, job):
        assert job == HONEST["cpp"]
        return SandboxOutcome(status="ok", stdout="42\n", exit_code=0)

    def plain(self, job):
        # Everybody's directories are no place for tests.
        mine = replace(job, program=job.program.replace("/tmp/left", "x/y").replace("/dev/shm/left", "x/y"))
        return self.real.run([mine])[0]

    def close(self):
        self.real.close()


class Sandbox:
    """The right one, for others to spoil."""

    session = Session

    def probe(self):
        return SandboxReport(usable=True, isolates=("files",), canaries=(SandboxCanary(name="files", passed=True),))

    def open(self, limits):
        return self.session(limits)


class Unusable(Sandbox):
    def probe(self):
        return SandboxReport(usable=False, reason="no jailer", hint="install jailer")

    def open(self, limits):
        raise EnvironmentUnmet("no jailer")


def reporting(**changes):
    return type("Wrong", (Sandbox,), {"probe": lambda self: replace(Sandbox.probe(self), **changes)})


def with_session(**methods):
    return type("Wrong", (Sandbox,), {"session": type("Session", (Session,), methods)})


class SilentlyUnusable(Unusable):
    def probe(self):
        return SandboxReport(usable=False)


class OpensAnyway(Unusable):
    def open(self, limits):
        return Session(limits)


class UsableAnyway(Unusable):
    def probe(self):
        return Sandbox.probe(self)


def changed(program=None, **changes):
    """Another outcome of hostile programs, or of one."""

    def hostile(self, one, job, outcome):
        return replace(outcome, **changes) if program in (None, one.name) else outcome

    return with_session(hostile=hostile)


def harming(self, program, job, outcome):
    """One program writes where it must not."""
    if job.stdin and program.name == "busy loop":
        Path(json.loads(job.stdin)["outside"], "kdkit-hostile").touch()
    return outcome


def confused(self, job):
    """The program after some hostile one gets another one's verdict."""
    return SandboxOutcome(status="timeout") if job == HONEST["python"] else Session.plain(self, job)


def without_input(self, job):
    return Session.plain(self, replace(job, stdin=""))


def without_files(self, job):
    return Session.plain(self, replace(job, files={}))


def everything_ends_well(self, job):
    return replace(Session.plain(self, job), status="ok", exit_code=0)


def giving(outcome):
    """Every plain program has this outcome."""
    return with_session(plain=lambda self, job: outcome)


def capitals(self, job):
    outcome = Session.plain(self, job)
    return replace(outcome, stdout=outcome.stdout.upper())


def forgets_the_limit(self, job):
    return SandboxOutcome(status="ok", exit_code=0) if "'x' *" in job.program else Session.plain(self, job)


def one_for_nothing(self, jobs):
    return Session.run(self, jobs) or [SandboxOutcome(status="ok", exit_code=0)]


def unlimited(self, job):
    if "'x' *" in job.program:
        return SandboxOutcome(status="output-limit", stdout="x" * 2**20)
    return Session.plain(self, job)


def no_reason(self, job):
    return SandboxOutcome(status="infra-error")


def backwards(self, jobs):
    return Session.run(self, jobs)[::-1]


def needs_jobs(self, jobs):
    return Session.run(self, jobs) if jobs else None


def one_directory(self, job):
    """What a program leaves is there for the next one."""
    if "left.txt" not in job.program:
        return Session.plain(self, job)
    self.leaves = getattr(self, "leaves", None) or "write" in job.program
    return SandboxOutcome(status="ok", stdout="" if "write" in job.program else "['left.txt']\n", exit_code=0)


def leaves_a_daemon(self):
    script = "import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(12)"
    subprocess.run([sys.executable, "-c", script], check=True)
    self.real.close()


def closes_once(self):
    assert not getattr(self, "closed", False), "closed already"
    self.closed = True
    self.real.close()


def never_closes(self):
    pass


PROBE, CLOSED = "test_the_probe_tries_it", "test_it_fails_closed"
PLAIN, ORDER = "test_verdicts_of_plain_programs", "test_an_outcome_for_every_job_in_order"
APART, LEFT = "test_programs_do_not_see_each_other", "test_nothing_is_left_running"
PYTHON = "test_hostile_python_programs_get_their_verdict_and_nothing_else"
CPP = "test_hostile_cpp_programs_get_their_verdict_and_nothing_else"
AFTER = "test_a_closed_session_runs_nothing"
DEAD = SandboxCanary(name="network", passed=False)
WRONG = {
    "no canaries": (reporting(canaries=()), PROBE, "the probe tried nothing"),
    "no names": (reporting(isolates=()), PROBE, "nothing that is isolated"),
    "a dead canary": (reporting(canaries=(DEAD,)), PROBE, "although canaries died: network"),
    "no reason": (SilentlyUnusable, PROBE, "unusable without a reason"),
    "no report": (type("Wrong", (Sandbox,), {"probe": lambda self: True}), PROBE, "bool is no SandboxReport"),
    "closed for no reason": (SilentlyUnusable, CLOSED, "unusable without a reason"),
    "opens anyway": (OpensAnyway, CLOSED, "that cannot isolate was opened"),
    "usable anyway": (UsableAnyway, CLOSED, "the probe says usable"),
    "no input": (with_session(plain=without_input), PLAIN, "runtime-error, not ok"),
    "no files": (with_session(plain=without_files), PLAIN, "runtime-error, not ok"),
    "all well": (with_session(plain=everything_ends_well), PLAIN, "ok, not runtime-error"),
    "no limit": (with_session(plain=unlimited), PLAIN, "characters of output were kept"),
    "a text": (giving("ok"), PLAIN, "str is no SandboxOutcome"),
    "a status of its own": (giving(SandboxOutcome(status="fine")), PLAIN, "there is no status 'fine'"),
    "two ends": (giving(SandboxOutcome(status="timeout", exit_code=1, signal=9)), PLAIN, "an exit code and a signal"),
    "ok with 1": (giving(SandboxOutcome(status="ok", exit_code=1)), PLAIN, "ok with exit code 1"),
    "before it began": (giving(SandboxOutcome(status="ok", exit_code=0, wall_s=-1.0)), PLAIN, "a negative measure"),
    "capitals": (with_session(plain=capitals), PLAIN, "printed 'NAÏVE CAFÉ"),
    "forgets the limit": (with_session(plain=forgets_the_limit), PLAIN, "too much output: ok"),
    "no reason for infra": (with_session(plain=no_reason), PLAIN, "infra-error without a reason"),
    "backwards": (with_session(run=backwards), ORDER, "out of order"),
    "one for nothing": (with_session(run=one_for_nothing), ORDER, "no jobs have outcomes"),
    "no jobs": (with_session(run=needs_jobs), ORDER, "NoneType"),
    "one directory": (with_session(plain=one_directory), APART, "sees what another one left"),
    "another verdict": (changed("busy loop", status="runtime-error"), PYTHON, "busy loop: runtime-error instead"),
    "finds a secret": (changed("accounts", stdout="PWNED"), PYTHON, "accounts: 'PWNED'"),
    "an exit code": (changed("exit 137", exit_code=1), PYTHON, "exit 137: exit code 1"),
    "harm": (with_session(hostile=harming), PYTHON, "something was written outside"),
    "the next one": (with_session(plain=confused), PYTHON, "after fork bomb: timeout"),
    "C++": (changed("C++ crash", signal=None, exit_code=0), CPP, "C\\+\\+ crash: exit code 0"),
    "a daemon": (with_session(close=leaves_a_daemon), LEFT, "still running: python"),
    "closes once": (with_session(close=closes_once), AFTER, "closed already"),
    "never closes": (with_session(close=never_closes), AFTER, "a closed session runs programs"),
}


def suite(sandbox, unusable=Unusable):
    return variant(SandboxConformance, build=sandbox, build_unusable=unusable, languages=("python", "cpp"))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sandbox_fails(name, tmp_path, monkeypatch):
    sandbox, test, reason = WRONG[name]
    monkeypatch.setattr("kdkit.testing.conformance.sandbox._PATIENCE", 1.0)
    made = suite(Sandbox, sandbox) if test == CLOSED else suite(sandbox)
    with pytest.raises((AssertionError, TypeError), match=reason):
        check(made, test, tmp_path)


@pytest.mark.parametrize("test", checks_of(SandboxConformance))
def test_a_right_sandbox_passes_and_no_test_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG.values()}
    check(suite(Sandbox), test, tmp_path)


def test_where_it_does_not_work_the_suite_is_skipped_unless_it_must(tmp_path, monkeypatch):
    monkeypatch.delenv("KDKIT_REQUIRE_SANDBOX", raising=False)
    with pytest.raises(pytest.skip.Exception, match="does not work here: no jailer"):
        check(suite(Unusable), ORDER, tmp_path)
    monkeypatch.setenv("KDKIT_REQUIRE_SANDBOX", "1")
    with pytest.raises(pytest.fail.Exception, match="does not work here: no jailer"):
        check(suite(Unusable), ORDER, tmp_path)


def test_programs_may_be_spared_or_get_another_verdict(tmp_path):
    wrong = changed("busy loop", status="ok")
    for allowed in ({"spares": frozenset({"busy loop"})}, {"verdicts": {"busy loop": "ok"}}):
        check(variant(SandboxConformance, build=wrong, **allowed), PYTHON, tmp_path)

from __future__ import annotations

import kdkit
from kdkit.api import Sandbox, SandboxJob, SandboxLimits, SandboxOutcome, SandboxSession
from kdkit.testing.conformance import SandboxConformance
from kdkit.testing.fakes import FakeSandbox

from kdkit_acme import sandbox

FLAKY = SandboxOutcome(status="timeout")


class TestSandbox(SandboxConformance):
    def build(self) -> Sandbox:
        inner: Sandbox = kdkit.build("sandbox", "auto")
        return sandbox.AcmeSandbox(inner, remember=8)

    def build_unusable(self) -> Sandbox:
        inner = FakeSandbox(usable=False)
        return sandbox.AcmeSandbox(inner, remember=8)


def opened(inner: Sandbox, remember: int = 8) -> SandboxSession:
    outer = sandbox.AcmeSandbox(inner, remember)
    return outer.open(SandboxLimits())


def test_a_program_runs_once() -> None:
    inner = FakeSandbox({"a": lambda job: job.stdin, "b": lambda _: "B"})
    session = opened(inner)
    a, b = SandboxJob(program="a", stdin="1"), SandboxJob(program="b")
    other = SandboxJob(program="a")
    first = session.run([a, b, a, other])
    assert [outcome.stdout for outcome in first] == ["1", "B", "1", ""]
    assert session.run([b, a, other]) == [first[1], first[0], first[3]]
    assert inner.jobs == [a, b, other]


def test_what_may_be_the_machines_fault_is_tried_again() -> None:
    inner = FakeSandbox({"slow": lambda _: FLAKY})
    session, job = opened(inner), SandboxJob(program="slow")
    assert session.run([job]) == session.run([job]) == [FLAKY]
    assert inner.jobs == [job, job]


def test_the_oldest_are_forgotten() -> None:
    inner = FakeSandbox()
    session, jobs = opened(inner, remember=2), [SandboxJob(program=name) for name in "abc"]
    session.run(jobs)
    session.run(jobs[1:])
    assert len(inner.jobs) == 3
    session.run(jobs[:1])
    assert inner.jobs[3:] == jobs[:1]

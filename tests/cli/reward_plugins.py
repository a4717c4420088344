"""A stage with rewards, a sandbox that runs nothing, and problems with tests; recipes load this file as a plugin."""

from __future__ import annotations

from pydantic import Field

from kdkit import Params, hookimpl
from kdkit.api import (
    Dataset,
    DatasetLoader,
    DatasetSpec,
    Example,
    Model,
    OneOrMore,
    Ref,
    Reward,
    RewardScore,
    RewardSpec,
    Rows,
    SandboxOutcome,
    SandboxSpec,
    Scheduled,
    StageSpec,
    Weighted,
)
from kdkit.testing.fakes import FakeSandbox


class Train(Params):
    model: Ref[Model] | None = None
    data: OneOrMore[Weighted[DatasetLoader]]
    rewards: list[Scheduled[Reward]] = Field([])


class Measure(Params):
    data: OneOrMore[Weighted[DatasetLoader]]
    rewards: list[Weighted[Reward]] = Field([])


class NoParams(Params):
    pass


class Working(Params):
    usable: bool = True
    down: bool = False


class Problems:
    def load(self, ctx):
        return Rows(examples=[problem(k) for k in range(3)])

    def sample(self):
        return Rows(examples=[problem(k) for k in range(100, 108)])


def problem(k):
    tests = [{"input": f"{n} {k}", "output": str(n + k)} for n in range(3)]
    return Example(id=f"add {k}", prompt=f"Add {k} to a number.", extra={"language": "python", "official_tests": tests})


def add(job):
    return str(sum(map(int, job.stdin.split())))


class TagCount:
    """The reward of many tutorials: a quarter for every tag."""

    def __call__(self, rollouts):
        return [RewardScore.of(min(1.0, 0.05 * r.text.count("think>") + 0.0)) for r in rollouts]


class Broken:
    def __call__(self, rollouts):
        return [RewardScore.of(1 / len(r.text)) for r in rollouts]


def sandbox(params):
    broken = SandboxOutcome(status="infra-error", stderr="no cgroup")
    return FakeSandbox({"add": lambda job: broken if params.down else add(job)}, usable=params.usable)


def no_run(params, ctx):
    raise AssertionError("trying rewards runs no stage")


@hookimpl
def kdkit_stages():
    yield StageSpec(name="pretend-grpo", summary="x", params=Train, run=no_run, outputs={"model": Model})
    yield StageSpec(name="pretend-measure", summary="x", params=Measure, run=no_run, outputs={"model": Model})
    yield StageSpec(name="pretend-make", summary="x", params=NoParams, run=no_run, outputs={"data": Dataset})


@hookimpl
def kdkit_sandboxes():
    yield SandboxSpec(name="fake", summary="x", params=Working, build=sandbox)


@hookimpl
def kdkit_datasets():
    yield DatasetSpec(name="sums", summary="x", params=NoParams, build=lambda params: Problems())


@hookimpl
def kdkit_rewards():
    for name, reward in (("tag-count", TagCount), ("broken", Broken)):
        yield RewardSpec(name=name, summary="x", params=NoParams, build=lambda p, ctx, r=reward: r(), range=(0.0, 1.0))

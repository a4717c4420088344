"""Components for the tests of the evaluate stage; recipes load this file as a plugin."""

from __future__ import annotations

from pathlib import Path

from kdkit import Params, hookimpl
from kdkit.api import (
    MetricResult,
    MetricSpec,
    Model,
    Ref,
    RewardScore,
    RewardSpec,
    RolloutSpec,
    TeacherSpec,
)


class NoParams(Params):
    pass


class Words(Params):
    n: int = 1


class Passed(Params):
    k: int = 1


class Logged(Params):
    log: str


class LoggedTeacher(Logged):
    model: Ref[Model]
    precision: str = "fp32"
    batch_size: int = 8


class Verdict(Params):
    answers: str = "score"


def mean(pairs):
    values = tuple(value for _, value in pairs)
    return MetricResult(
        value=sum(values) / len(values), per_example=values, n=len(values), ids=tuple(name for name, _ in pairs)
    )


class Count:
    """Words of every answer, plus ``n`` to tell two instances apart."""

    def __init__(self, n):
        self.n = n

    def score(self, predictions):
        return mean([(p.id, float(len(p.text.split()) + self.n)) for p in predictions])


class Share:
    def score(self, predictions):
        return mean([(p.id, float(p.verdict)) for p in predictions if p.verdict is not None])


class Exposed:
    """Sum of the model's own trace; reads every prediction it is given, so one without traces would show."""

    def score(self, predictions):
        return mean([(p.id, sum(p.traces["own_kl"])) for p in predictions])


class Canned:
    """Passes, fails, gives up and breaks in turn; ``score`` gives the rollout's fields away in its reason."""

    def __init__(self, answers):
        self.answers = answers

    def __call__(self, rollouts):
        kinds = [RewardScore.of(1.0), RewardScore.of(0.99), RewardScore.unscorable("no"), RewardScore.infra_error("x")]
        for rollout in rollouts:
            assert rollout.example.prompt == rollout.prompt, "the rollout of another row"
            assert len(rollout.token_ids) == 6 or not rollout.truncated
        given = [kinds[i % 4] for i in range(len(rollouts))]
        return given[1:] if self.answers == "short" else given


def note(log, event):
    with Path(log).open("a") as out:
        out.write(event + "\n")


def teacher(params, ctx):
    from kdkit.plugins.teachers.local import LocalTeacher

    class Noted(LocalTeacher):
        def generate(self, prompts, sampling, seed):
            note(params.log, "teacher answers")
            return super().generate(prompts, sampling, seed)

        def close(self):
            note(params.log, "teacher closed")
            super().close()

    note(params.log, "teacher loaded")
    return Noted(params, ctx)


def rollouts(params, ctx, model):
    from kdkit.plugins.rollouts.plugin import TransformersRolloutParams
    from kdkit.plugins.rollouts.transformers_engine import TransformersRollouts

    class Noted(TransformersRollouts):
        def generate(self, prompts, sampling, seeds):
            note(params.log, "decoding")
            return super().generate(prompts, sampling, seeds)

    return Noted(TransformersRolloutParams(), ctx, model)


@hookimpl
def kdkit_metrics():
    yield MetricSpec(
        name="words",
        summary="Words",
        params=Words,
        build=lambda params: Count(params.n),
        higher_is_better=None,
        key=lambda params: "words" if params.n == 1 else f"words-{params.n}",
    )
    yield MetricSpec(
        name="bad-key",
        summary="x",
        params=NoParams,
        build=lambda params: Count(1),
        higher_is_better=True,
        key=lambda params: "a/b",
    )
    yield MetricSpec(
        name="passed",
        summary="Share of passed answers",
        params=Passed,
        build=lambda params: Share(),
        higher_is_better=True,
        needs=frozenset({"completion", "verdict"}),
    )
    yield MetricSpec(
        name="exposed",
        summary="Divergence on own answers",
        params=NoParams,
        build=lambda params: Exposed(),
        higher_is_better=False,
        needs=frozenset({"completion", "exposure"}),
    )


@hookimpl
def kdkit_rewards():
    yield RewardSpec(
        name="canned",
        summary="Canned verdicts",
        params=Verdict,
        build=lambda params, ctx: Canned(params.answers),
        range=(0.0, 1.0),
    )
    yield RewardSpec(
        name="half", summary="Half", params=Verdict, build=lambda params, ctx: Canned("score"), range=(0, 0.5)
    )


@hookimpl
def kdkit_teachers():
    gives = {"noted": {"logits", "text"}, "mute": {"logits"}}
    for name, kinds in gives.items():
        yield TeacherSpec(name=name, summary="Noted", params=LoggedTeacher, build=teacher, gives=frozenset(kinds))


@hookimpl
def kdkit_rollouts():
    yield RolloutSpec(name="noted", summary="Noted", params=Logged, build=rollouts)

"""Components for the tests of the evaluate stage; recipes load this file as a plugin."""

from __future__ import annotations

import math
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


class Wrong(Params):
    what: str = "text"


class Traced(Params):
    tokens: int = 6


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


class Ratio:
    """Breaks on an empty answer, and on one that does not exist."""

    def score(self, predictions):
        return mean([(p.id, len(p.references[0]) / len(p.text)) for p in predictions])


class Spoken:
    """Leaves empty answers out; NumPy numbers; a NaN for a text that names itself so."""

    def score(self, predictions):
        import numpy as np

        kept = [p for p in predictions if p.text]
        values = tuple(np.float32(math.nan if p.text == "nan" else len(p.text)) for p in kept)
        total = np.float32(sum(values) / len(values)) if kept else math.nan
        return MetricResult(value=total, per_example=values, n=len(kept), ids=tuple(p.id for p in kept))


class Bad:
    """A result that is none, in the way that ``what`` names."""

    def __init__(self, what):
        self.what = what

    def score(self, predictions):
        n = len(predictions)
        ways = {"weights": {"weights": (1.0,) * (n + 1)}, "negative": {"weights": (-1.0,) * n}, "link": {"link": "log"}}
        values = {"value": "one" if self.what == "text" else 1.0, "per_example": (1.0,) * n}
        return MetricResult(**values, n=n, **ways.get(self.what, {}))


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
    for name, build in (("ratio", Ratio), ("spoken", Spoken)):
        yield MetricSpec(
            name=name,
            summary="x",
            params=NoParams,
            build=lambda params, build=build: build(),
            higher_is_better=True,
        )
    yield MetricSpec(
        name="bad", summary="x", params=Wrong, build=lambda params: Bad(params.what), higher_is_better=True
    )
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
        params=Traced,
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

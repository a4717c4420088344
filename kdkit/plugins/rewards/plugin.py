"""The built-in rewards. Light: the implementations are imported when one is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdkit.api.errors import RecipeError
from kdkit.api.hookspecs import hookimpl
from kdkit.api.specs import RewardSpec
from kdkit.plugins.rewards.params import (
    CorrectnessParams,
    LanguageParams,
    LengthParams,
    RepetitionParams,
    RougeParams,
    StepsParams,
    TeacherLogprobParams,
    ThinkParams,
)

if TYPE_CHECKING:
    from kdkit.api import BuildContext, Reward

__all__ = ["kdkit_rewards"]


def _think(params: ThinkParams, ctx: BuildContext) -> Reward:
    from kdkit.plugins.rewards.think import Think

    del ctx
    return Think(partial=params.partial, answer_tags=params.answer_tags)


def _steps(params: StepsParams, ctx: BuildContext) -> Reward:
    from kdkit.plugins.rewards.think import Steps

    del ctx
    return Steps(steps=params.steps, max_steps=params.max_steps, min_words=params.min_words)


def _correctness(params: CorrectnessParams, ctx: BuildContext) -> Reward:
    from kdkit.plugins.rewards.correctness import Correctness, shared_judge

    return Correctness(params, shared_judge(params, ctx))


def _length(params: LengthParams, ctx: BuildContext) -> Reward:
    from kdkit.plugins.rewards.length import Length

    return Length(params, None if params.correctness is None else ctx.build(params.correctness))


def _repetition(params: RepetitionParams, ctx: BuildContext) -> Reward:
    from kdkit.plugins.rewards.repetition import Repetition

    del ctx
    return Repetition(n=params.n)


def _language(params: LanguageParams, ctx: BuildContext) -> Reward:
    from kdkit.plugins.rewards.language import LanguageReward

    del ctx
    return LanguageReward(language=params.language)


def _rouge(params: RougeParams, ctx: BuildContext) -> Reward:
    from kdkit.plugins.rewards.rouge import Rouge

    spec: Any = params.metric.found.spec
    if spec.needs != {"completion", "reference"} or spec.higher_is_better is not True or spec.unit != "0-100":
        raise RecipeError(
            f"metric {params.metric.name!r} does not compare answers with references on a scale of 0 to 100",
            where="reward rouge",
            allowed="rouge-l, chrf, exact-match, code-exact",
        )
    return Rouge(ctx.build(params.metric))


def _teacher_logprob(params: TeacherLogprobParams, ctx: BuildContext) -> Reward:
    from kdkit.plugins.rewards.teacher_logprob import TeacherLogprob

    return TeacherLogprob(params, ctx)


@hookimpl
def kdkit_rewards() -> Iterator[RewardSpec[Any]]:
    """The built-in rewards."""
    yield from _of_form()
    yield from _of_content()


def _of_form() -> Iterator[RewardSpec[Any]]:
    yield RewardSpec(
        name="think",
        summary="One non-empty <think>...</think> before an answer",
        params=ThinkParams,
        build=_think,
        range=(0.0, 1.0),
    )
    yield RewardSpec(
        name="steps",
        summary="Distinct numbered steps with content inside the thought",
        params=StepsParams,
        build=_steps,
        range=(0.0, 1.0),
    )
    yield RewardSpec(
        name="length",
        summary="Tokens: cosine scaled by correctness, target window or overlong penalty",
        params=LengthParams,
        build=_length,
        range=(-1.0, 1.0),
    )
    yield RewardSpec(
        name="repetition",
        summary="Minus the share of repeated n-grams of words",
        params=RepetitionParams,
        build=_repetition,
        range=(-1.0, 0.0),
    )
    yield RewardSpec(
        name="language",
        summary="Share of the prose that is in one language",
        params=LanguageParams,
        build=_language,
        range=(0.0, 1.0),
    )


def _of_content() -> Iterator[RewardSpec[Any]]:
    yield RewardSpec(
        name="correctness",
        summary="The answer's program passes the example's tests, run in a sandbox",
        params=CorrectnessParams,
        build=_correctness,
        range=(0.0, 1.0),
    )
    yield RewardSpec(
        name="rouge",
        summary="ROUGE-L, or another metric, of the answer and the references",
        params=RougeParams,
        build=_rouge,
        range=(0.0, 1.0),
    )
    yield RewardSpec(
        name="teacher-logprob",
        summary="Mean log-probability of the completion under a teacher",
        params=TeacherLogprobParams,
        build=_teacher_logprob,
        range=(-1.0, 0.0),
    )

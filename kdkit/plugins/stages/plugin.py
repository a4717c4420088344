"""Built-in stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kdkit.api import (
    Component,
    Dataset,
    Model,
    OneOrMore,
    Params,
    Precision,
    Ref,
    ReportFiles,
    Sampling,
    Scores,
    StageContext,
    StageSpec,
    Weighted,
    hookimpl,
)
from kdkit.api.protocols import DatasetLoader, Loss, Metric, Reward, RolloutEngine, StageOutputs, Teacher
from kdkit.plugins.stages.caching_plugin import CACHE_TEACHER
from kdkit.plugins.stages.checks import check_distill, check_evaluate, check_generate, check_sft
from kdkit.plugins.stages.grpo_plugin import GRPO
from kdkit.plugins.stages.lm_eval_plugin import LM_EVAL
from kdkit.plugins.stages.minillm_plugin import MINILLM
from kdkit.plugins.stages.quantizing_plugin import DEQUANTIZE, QUANTIZE
from kdkit.train.params import TrainParams


class SftParams(TrainParams):
    """Supervised fine-tuning on answers."""

    model: Ref[Model]
    """The model to train."""
    losses: list[Weighted[Loss]] = Field(default=[{"use": "cross-entropy"}], validate_default=True, min_length=1)  # type: ignore[list-item]
    """Weighted sum of losses; weights are used as they are."""


class OwnAnswers(Sampling):
    """How the student answers in on-policy steps. Defaults are those of GKD: the student's own distribution."""

    do_sample: bool = True
    """Sample from the student; false is greedy decoding."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest answer in tokens, its end token included; ``max_length`` bounds prompt and answer together. A longer one
    is cut, and learned without an end token."""


class DistillParams(TrainParams):
    """Training a student on a teacher's distributions: on the data's answers, or on its own (GKD)."""

    model: Ref[Model]
    """The student."""
    teacher: Component[Teacher]
    """Where the signals come from. Divergences per token need a teacher that shares the student's vocabulary; with
    ``uld`` it may have its own tokenizer and chat template."""
    losses: list[Weighted[Loss]] = Field(
        default=[{"use": "forward-kl", "weight": 0.5}, {"use": "cross-entropy", "weight": 0.5}],  # type: ignore[list-item]
        validate_default=True,
        min_length=1,
    )
    """Weighted sum of losses; weights are used as they are."""
    on_policy: float = Field(0.0, ge=0, le=1)
    """Share of the optimiser steps in which the student's own answers, sampled on the spot, replace those of the data
    (the lambda of GKD, Agarwal et al. 2024). It takes losses that compare with the teacher only: the likelihood of an
    answer that the student gave itself says nothing about the teacher."""
    sampling: OwnAnswers | None = None
    """Decoding of the student's own answers; by default plain sampling of up to 128 tokens. Only with ``on_policy``."""


class GenerateParams(Params):
    """Answers of a teacher to prompts: data for sequence-level distillation."""

    teacher: Component[Teacher]
    """Who answers."""
    data: OneOrMore[Component[DatasetLoader]]
    """Prompts; completions that are already there are replaced."""
    sampling: Sampling = Sampling()
    """Decoding. Answers that hit max_new_tokens are left out: half an answer teaches where not to stop."""


def _named(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("use"), str):
        return {value["use"].rpartition("/")[2]: value}
    return value


class EvaluateParams(Params):
    """The same prompts, decoding and metrics for every model."""

    models: dict[str, Ref[Model]] = Field(min_length=1)
    """Models by the name they have in the report."""
    data: Annotated[dict[str, Component[DatasetLoader]], BeforeValidator(_named), Field(min_length=1)]
    """Datasets by name, or one dataset."""
    metrics: list[Component[Metric]] = Field(min_length=1)
    """Metrics; one may appear several times with other parameters, if they give it another key in the report."""
    teacher: Component[Teacher] | None = None
    """Needed by metrics that compare distributions (teacher-kl). It is loaded only after all models have answered."""
    judge: Component[Reward] | None = None
    """Needed by metrics of passed answers (pass-at-k): an answer passes when this reward gives it 1 or more."""
    rewards: list[Weighted[Reward]] = Field(default_factory=list)
    """Rewards of a grpo stage, scored on the answers beside the metrics: each one's mean as `reward-NAME`, and their
    weighted sum as `reward` where there are several. So the share of answers in the right form stands in the report."""
    baselines: bool = True
    """Score trivial answers as well (echo of the input, nothing, the most common reference) and the reference itself,
    with the metrics that compare texts."""
    sampling: Sampling = Sampling()
    """Decoding of the answers; greedy by default."""
    num_samples: int = Field(1, ge=1)
    """Answers to each prompt; more than one needs do_sample. Intervals resample prompts, not answers. Metrics of
    teacher-forced measures (perplexity, teacher-kl, exposure-bias) count each prompt once."""
    rollout: Component[RolloutEngine] = Field(default={"use": "transformers"}, validate_default=True)  # type: ignore[assignment]
    """Engine that decodes."""
    max_prompt_length: int = Field(1024, ge=1)
    """Longest prompt in tokens."""
    overlong_prompts: Literal["fail", "drop"] = "fail"
    """A prompt that is too long for any of the models is an error, or is left out for all of them, and counted."""
    max_length: int = Field(2048, ge=2)
    """Prompt and reference together, for teacher-forced metrics; longer rows are left out and counted, and so are those
    that exceed the positions of the model or the teacher."""
    per_device_eval_batch_size: int = Field(16, ge=1)
    """Rows of one teacher-forced forward pass; in bf16 the rounding depends on it."""
    precision: Precision = "auto"
    """Weights and matrix products in bf16 or fp32."""


class ReportParams(Params):
    """One table for all models, with intervals and paired differences."""

    scores: list[Ref[Scores]] = Field(min_length=1)
    """Outputs of evaluate stages."""
    teacher: str | None = None
    """Name of the teacher among the models, for retention and the closed gap; ``teacher`` when there is one."""
    baseline: str | None = None
    """Name of the untrained student among them, for the closed gap; ``base`` or ``baseline`` when there is one."""
    reference: str | None = None
    """The model that the marks in the table compare with; the baseline when there is one."""


def _sft(params: SftParams, ctx: StageContext) -> StageOutputs:
    from kdkit.plugins.stages.training import run_sft

    return run_sft(params, ctx)


def _distill(params: DistillParams, ctx: StageContext) -> StageOutputs:
    from kdkit.plugins.stages.training import run_distill

    return run_distill(params, ctx)


def _generate(params: GenerateParams, ctx: StageContext) -> StageOutputs:
    from kdkit.plugins.stages.generating import run

    return run(params, ctx)


def _evaluate(params: EvaluateParams, ctx: StageContext) -> StageOutputs:
    from kdkit.plugins.stages.evaluating import run

    return run(params, ctx)


def _report(params: ReportParams, ctx: StageContext) -> StageOutputs:
    from kdkit.plugins.stages.report_stage import run

    return run(params, ctx)


@hookimpl
def kdkit_stages() -> Iterator[StageSpec[Any]]:
    """The stages."""
    yield StageSpec(
        name="sft",
        summary="Supervised fine-tuning on answers",
        params=SftParams,
        run=_sft,
        outputs={"model": Model},
        check=check_sft,
    )
    yield StageSpec(
        name="distill",
        summary="Train a student on a teacher's distributions",
        params=DistillParams,
        run=_distill,
        outputs={"model": Model},
        check=check_distill,
        version=2,
    )
    yield MINILLM
    yield GRPO
    yield StageSpec(
        name="generate",
        summary="Let a teacher answer prompts and keep the answers as a dataset",
        params=GenerateParams,
        run=_generate,
        outputs={"data": Dataset},
        check=check_generate,
        version=3,
    )
    yield CACHE_TEACHER
    yield QUANTIZE
    yield DEQUANTIZE
    yield StageSpec(
        name="evaluate",
        summary="Score models on the same prompts with the same decoding",
        params=EvaluateParams,
        run=_evaluate,
        outputs={"scores": Scores},
        check=check_evaluate,
        version=5,
    )
    yield LM_EVAL
    yield StageSpec(
        name="report",
        summary="One table with intervals, paired differences and the closed gap",
        params=ReportParams,
        run=_report,
        outputs={"report": ReportFiles},
        launch="inline",
        names_recipe=True,
        version=3,
    )

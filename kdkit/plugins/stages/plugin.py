"""Built-in stages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Final

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
from kdkit.api.protocols import DatasetLoader, Loss, Metric, RolloutEngine, StageOutputs, Teacher
from kdkit.train.params import TrainParams

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Problems = list[tuple[tuple[str | int, ...], str]]


class SftParams(TrainParams):
    """Supervised fine-tuning on answers."""

    model: Ref[Model]
    """The model to train."""
    losses: list[Weighted[Loss]] = Field(default=[{"use": "cross-entropy"}], validate_default=True, min_length=1)  # type: ignore[list-item]
    """Weighted sum of losses; weights are used as they are."""


class DistillParams(TrainParams):
    """Training a student on a teacher's distributions."""

    model: Ref[Model]
    """The student."""
    teacher: Component[Teacher]
    """Where the signals come from; it must share the student's vocabulary."""
    losses: list[Weighted[Loss]] = Field(
        default=[{"use": "forward-kl", "weight": 0.5}, {"use": "cross-entropy", "weight": 0.5}],  # type: ignore[list-item]
        validate_default=True,
        min_length=1,
    )
    """Weighted sum of losses; weights are used as they are."""


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
    """Metrics; each may appear once."""
    teacher: Component[Teacher] | None = None
    """Needed by metrics that compare distributions (teacher-kl)."""
    sampling: Sampling = Sampling()
    """Decoding of the answers; greedy by default."""
    rollout: Component[RolloutEngine] = Field(default={"use": "transformers"}, validate_default=True)  # type: ignore[assignment]
    """Engine that decodes."""
    max_prompt_length: int = Field(1024, ge=1)
    """A longer prompt is an error: every model answers the same prompts."""
    max_length: int = Field(2048, ge=2)
    """Prompt and reference together, for teacher-forced metrics; longer rows are left out and counted."""
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


def _check_losses(losses: list[Weighted[Loss]], gives: frozenset[str]) -> Problems:
    """Problems of losses that this stage cannot feed; ``gives`` is what its teacher gives, empty without one."""
    problems: Problems = []
    for index, loss in enumerate(losses):
        spec: Any = loss.found.spec
        where = ("losses", index, "use")
        if spec.loss_kind != "token":
            problems.append((where, f"'{loss.name}' is a {spec.loss_kind} loss; this stage takes token losses"))
        elif spec.needs and not gives:
            problems.append((where, f"'{loss.name}' needs a teacher; use a distill stage"))
        elif spec.needs and not spec.needs & gives:
            wants, has = " or ".join(sorted(spec.needs)), ", ".join(sorted(gives))
            problems.append((where, f"'{loss.name}' needs {wants}, the teacher gives {has}"))
    names = [loss.name for loss in losses]
    problems += [
        (("losses", index, "use"), f"'{name}' appears twice")
        for index, name in enumerate(names)
        if name in names[:index]
    ]
    return problems


def _check_sft(params: SftParams) -> Problems:
    return _check_losses(params.losses, frozenset())


def _check_distill(params: DistillParams) -> Problems:
    spec: Any = params.teacher.found.spec
    problems = _check_losses(params.losses, spec.gives)
    if not any(loss.found.spec.needs for loss in params.losses if hasattr(loss.found.spec, "needs")):
        problems.append((("losses",), "no loss uses the teacher; add one, such as forward-kl, or use an sft stage"))
    return problems


def _check_generate(params: GenerateParams) -> Problems:
    spec: Any = params.teacher.found.spec
    if "text" not in spec.gives:
        return [(("teacher", "use"), f"'{params.teacher.name}' gives no text")]
    return []


def _check_evaluate(params: EvaluateParams) -> Problems:
    problems: Problems = []
    names = [metric.name for metric in params.metrics]
    for index, metric in enumerate(params.metrics):
        spec: Any = metric.found.spec
        if "teacher-kl" in spec.needs and params.teacher is None:
            problems.append((("metrics", index, "use"), f"'{metric.name}' needs 'teacher' in this stage"))
        if metric.name in names[:index]:
            problems.append((("metrics", index, "use"), f"'{metric.name}' appears twice"))
    if params.teacher is not None:
        teacher: Any = params.teacher.found.spec
        if "logits" not in teacher.gives:
            problems.append((("teacher", "use"), f"'{params.teacher.name}' gives no logits"))
        if "teacher-kl" not in {need for metric in params.metrics for need in _needs(metric)}:
            problems.append((("teacher",), "no metric uses the teacher; add teacher-kl, or leave the teacher out"))
    # Names become parts of file names.
    for slot, names_of in (("models", params.models), ("data", params.data)):
        problems += [
            ((slot, name), f"'{name}' is no name; use letters, digits, '.', '_' and '-'")
            for name in names_of
            if not _NAME.fullmatch(name)
        ]
    return problems


def _needs(metric: Component[Metric]) -> frozenset[str]:
    spec: Any = metric.found.spec
    return frozenset(spec.needs)


@hookimpl
def kdkit_stages() -> Iterator[StageSpec[Any]]:
    """The stages."""
    yield StageSpec(
        name="sft",
        summary="Supervised fine-tuning on answers",
        params=SftParams,
        run=_sft,
        outputs={"model": Model},
        check=_check_sft,
    )
    yield StageSpec(
        name="distill",
        summary="Train a student on a teacher's distributions",
        params=DistillParams,
        run=_distill,
        outputs={"model": Model},
        check=_check_distill,
    )
    yield StageSpec(
        name="generate",
        summary="Let a teacher answer prompts and keep the answers as a dataset",
        params=GenerateParams,
        run=_generate,
        outputs={"data": Dataset},
        check=_check_generate,
    )
    yield StageSpec(
        name="evaluate",
        summary="Score models on the same prompts with the same decoding",
        params=EvaluateParams,
        run=_evaluate,
        outputs={"scores": Scores},
        check=_check_evaluate,
    )
    yield StageSpec(
        name="report",
        summary="One table with intervals, paired differences and the closed gap",
        params=ReportParams,
        run=_report,
        outputs={"report": ReportFiles},
        launch="inline",
        names_recipe=True,
    )

"""The training stages: load, encode, train with the shared loop, save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from kdkit.api.artifacts import Model
from kdkit.api.errors import ModelError, StageError
from kdkit.api.protocols import RowTeacher
from kdkit.models.card import ModelCard, render_card
from kdkit.models.chat import ChatEncoder
from kdkit.models.cuts import CutEncoder
from kdkit.models.heads import verify_split
from kdkit.models.load import check_same_vocabulary, load_model, load_tokenizer, vocabulary
from kdkit.models.save import read_provenance, save_model
from kdkit.plugins.stages.plugin import DistillParams, OwnAnswers
from kdkit.plugins.stages.served import check_same_teacher
from kdkit.train.alignment import encode_aligned
from kdkit.train.encoding import encode_rows
from kdkit.train.loop import TrainResult, data_task, train
from kdkit.train.objective import LossTerm
from kdkit.train.on_policy import OnPolicy
from kdkit.train.rollout import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdkit.api import Component, StageContext, Teacher
    from kdkit.api.protocols import DatasetLoader, StageOutputs
    from kdkit.models.chat import Encoded
    from kdkit.plugins.stages.plugin import SftParams
    from kdkit.train.params import TrainParams

__all__ = ["Student", "load_student", "run_distill", "run_sft", "save_student", "stop_where_trained"]


@dataclass(frozen=True, slots=True)
class Student:
    """The model to train, with what belongs to it."""

    artifact: Model
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def run_sft(params: SftParams, ctx: StageContext) -> StageOutputs:
    """Train on answers alone."""
    return _train(params, ctx, load_student(params.model, ctx), teacher=None, method="supervised fine-tuning")


def run_distill(params: DistillParams, ctx: StageContext) -> StageOutputs:
    """Train on the teacher's distributions.

    Raises:
        ModelError: Teacher and student have different vocabularies, and a loss compares them token by token.
    """
    student = load_student(params.model, ctx)
    teacher = ctx.build(params.teacher)
    method = "knowledge distillation"
    if params.on_policy:
        method += f", {params.on_policy:.0%} of the steps on its own answers"
    try:
        return _train(params, ctx, student, teacher=teacher, method=method)
    finally:
        teacher.close()


def load_student(ref: Any, ctx: StageContext) -> Student:
    """The model to train, with float32 master weights."""
    artifact: Model = ctx.resolve(ref)
    tokenizer = load_tokenizer(artifact)
    model = load_model(artifact, dtype=torch.float32, train=True)
    verify_split(model)
    return Student(artifact, model, tokenizer)


def _train(
    params: TrainParams, ctx: StageContext, student: Student, *, teacher: Teacher | None, method: str
) -> StageOutputs:
    own = vocabulary(student.tokenizer, student.model)
    encoder = ChatEncoder(student.tokenizer)
    reader, shared = None, None
    if teacher is not None and _is_aligned(params):
        reader, shared = _reader(teacher), teacher.vocabulary.size
        encoder = CutEncoder(student.tokenizer)
    elif teacher is not None:
        shared = check_same_vocabulary(own, teacher.vocabulary)
    if teacher is not None:
        check_same_teacher(teacher, ctx)
    encode = partial(_encode, encoder=encoder, reader=reader, params=params, ctx=ctx)
    precision = ctx.precision(params.precision)
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    data = [encode(component) for component in params.data]
    task = data_task(
        student.model,
        _terms(params, ctx, shared),
        data,
        [component.weight for component in params.data],
        seed=ctx.seed_for("data-order"),
        held_out=[row for component in params.eval_data or () for row in encode(component)[: params.eval_rows]],
        signals=teacher.signals if teacher is not None else None,
        on_policy=_on_policy(params, ctx, student, encoder, shared, compute),
    )
    if isinstance(teacher, RowTeacher):
        teacher.check(own, student.tokenizer, [row for rows in (*data, task.held_out) for row in rows])
    # Before the work: what cannot be saved afterwards must not be found out afterwards.
    stop_where_trained(student.model, encoder)
    result = train(task, params, ctx, compute=compute)
    return {"model": save_student(params, ctx, student, result, precision=precision, method=method)}


def _on_policy(
    params: TrainParams,
    ctx: StageContext,
    student: Student,
    encoder: ChatEncoder,
    shared: int | None,
    compute: torch.dtype,
) -> OnPolicy | None:
    if not isinstance(params, DistillParams) or not params.on_policy:
        return None
    return OnPolicy(
        student.model,
        params.sampling or OwnAnswers(),
        share=params.on_policy,
        seed=ctx.seed_for("on-policy"),
        stop_ids=stop_ids(student.model, encoder),
        max_length=params.max_length,
        compute=compute,
        vocabulary=shared,
    )


def _terms(params: TrainParams, ctx: StageContext, shared: int | None) -> list[LossTerm]:
    return [
        LossTerm(
            name=loss.name,
            weight=loss.weight,
            loss=ctx.build(loss),
            # Only a divergence is confined to the entries both models have; a likelihood sees every entry.
            vocabulary=shared if loss.found.spec.needs else None,  # type: ignore[attr-defined]
            kind=loss.found.spec.loss_kind,  # type: ignore[attr-defined]
        )
        for loss in params.losses
    ]


def _is_aligned(params: TrainParams) -> bool:
    return any(loss.found.spec.loss_kind == "aligned" for loss in params.losses)  # type: ignore[attr-defined]


def _reader(teacher: Teacher) -> CutEncoder:
    """What renders the rows for a teacher with its own tokenizer."""
    tokenizer = getattr(teacher, "tokenizer", None)
    if tokenizer is None:
        raise ModelError(
            "the teacher has no tokenizer to read the rows with", hint="aligned losses (uld) need the teacher 'local'"
        )
    return CutEncoder(tokenizer)


def _encode(
    component: Component[DatasetLoader],
    *,
    encoder: ChatEncoder,
    reader: CutEncoder | None,
    params: TrainParams,
    ctx: StageContext,
) -> Sequence[Encoded]:
    """Rows of a dataset in the student's tokens, and in the teacher's own when it has a ``reader``."""
    rows, name = ctx.load(component), f"dataset {component.name}"
    limits: dict[str, Any] = {"max_length": params.max_length, "overlong": params.overlong}
    if reader is not None and isinstance(encoder, CutEncoder):
        return encode_aligned(rows.examples, encoder, reader, log=ctx.log, name=name, **limits)
    return encode_rows(rows.examples, encoder, log=ctx.log, name=name, **limits)


def stop_where_trained(model: PreTrainedModel, encoder: ChatEncoder) -> None:
    """Let ``generate`` stop at the end token that is trained, whatever the base model stopped at.

    transformers refuses to save a changed configuration with sampling values but without ``do_sample``, which many
    published models have; they are dropped then, since greedy decoding never used them.
    """
    config: Any = model.generation_config
    config.eos_token_id = list(stop_ids(model, encoder))
    try:
        config.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )


def save_student(
    params: TrainParams, ctx: StageContext, student: Student, result: TrainResult, *, precision: str, method: str
) -> Model:
    """Write the trained model with its card. Raises ``StageError`` when weights are not finite."""
    before = read_provenance(student.artifact.path)
    # A model from an earlier stage goes back to the model that stage started from.
    base_model = str(before.get("base_model", student.artifact.name))
    facts = {
        "method": method,
        "losses": {loss.name: loss.weight for loss in params.losses},
        "steps": result.steps,
        "skipped_steps": result.skipped,
        "best_step": result.best_step,
        "learned_tokens": result.tokens,
        "trained_tokens": int(before.get("trained_tokens", 0)) + result.tokens,
        "parameters": student.model.num_parameters(),
        "precision": precision,
        "recipe": ctx.recipe,
        "stage": ctx.name,
        "base_model": base_model,
        "evaluation": {k: v if math.isfinite(v) else None for k, v in result.evaluation.items()},
    }
    card = ModelCard(
        name=f"{ctx.recipe}: {ctx.name}",
        summary=f"Made with kdkit by {method}.",
        base_model=base_model,
        facts={k: v for k, v in facts.items() if k in {"losses", "steps", "trained_tokens", "parameters", "precision"}},
    )
    path = ctx.out / "model"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        save_model(student.model, student.tokenizer, path, dtype=dtype, card=render_card(card), provenance=facts)
    except StageError as error:
        raise StageError(f"training diverged: {error.what}", hint="lower learning_rate") from error
    return Model(path=path, info={k: facts[k] for k in ("parameters", "trained_tokens", "steps", "evaluation")})

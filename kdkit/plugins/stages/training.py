"""The training stages: load, encode, train with the shared loop, save."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

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
from kdkit.plugins.stages.checks import uses_teacher
from kdkit.plugins.stages.plugin import DistillParams, OwnAnswers
from kdkit.plugins.stages.served import check_same_teacher
from kdkit.train.alignment import encode_aligned
from kdkit.train.encoding import encode_rows
from kdkit.train.loop import TrainResult, data_task, train
from kdkit.train.objective import LossTerm
from kdkit.train.on_policy import OnPolicy
from kdkit.train.representation import matched, teacher_layers
from kdkit.train.rollout import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdkit.api import Component, StageContext, Teacher, TeacherSignals, TokenBatch
    from kdkit.api.hidden import HiddenTeacher
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
        ModelError: Teacher and student have different vocabularies, and a loss compares them token by token; or a loss
            wants another temperature than that of the teacher's stored signals.
    """
    teacher = ctx.build(params.teacher)
    method = "knowledge distillation"
    if params.on_policy:
        method += f", {params.on_policy:.0%} of the steps on its own answers"
    try:
        fixed = _row_teacher(params, teacher)
        student = load_student(params.model, ctx)
        return _train(params, ctx, student, teacher=teacher, fixed=fixed, method=method)
    finally:
        teacher.close()


def _row_teacher(params: DistillParams, teacher: Teacher) -> RowTeacher | None:
    """The teacher, when it knows certain rows only.

    Raises:
        ModelError: A loss wants another temperature than that of its distributions.
    """
    if not params.teacher.found.spec.fixed_rows or not isinstance(teacher, RowTeacher):  # type: ignore[attr-defined]
        return None
    taken = teacher.temperature
    for loss in params.losses:
        wanted = getattr(loss.params, "temperature", taken)
        if loss.found.spec.needs and not math.isclose(wanted, taken, rel_tol=1e-6):  # type: ignore[attr-defined]
            what = f"the teacher's signals were taken at temperature {taken:g}, the loss '{loss.name}' wants {wanted:g}"
            hint = f"set 'temperature: {taken:g}' on the loss, or take the signals again at {wanted:g}"
            raise ModelError(what, where=f"teacher '{params.teacher.name}'", hint=hint)
    return teacher


def load_student(ref: Any, ctx: StageContext) -> Student:
    """The model to train, with float32 master weights."""
    artifact: Model = ctx.resolve(ref)
    tokenizer = load_tokenizer(artifact)
    model = load_model(artifact, dtype=torch.float32, train=True)
    verify_split(model)
    return Student(artifact, model, tokenizer)


def _train(
    params: TrainParams,
    ctx: StageContext,
    student: Student,
    *,
    teacher: Teacher | None,
    fixed: RowTeacher | None = None,
    method: str,
) -> StageOutputs:
    own = vocabulary(student.tokenizer, student.model)
    if fixed is not None:
        fixed.check_student(own, student.tokenizer)
    encoder = ChatEncoder(student.tokenizer)
    reader, shared = None, None
    if teacher is not None and _is_aligned(params):
        reader, shared = _reader(teacher), teacher.vocabulary.size
        encoder = CutEncoder(student.tokenizer)
    elif teacher is not None:
        shared = check_same_vocabulary(own, teacher.vocabulary)
    if teacher is not None:
        check_same_teacher(teacher, ctx)
    positions = getattr(student.model.config, "max_position_embeddings", None), getattr(teacher, "positions", None)
    encode = partial(_encode, encoder=encoder, reader=reader, params=params, ctx=ctx, positions=positions)
    precision = ctx.precision(params.precision)
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    terms = matched(_terms(params, ctx, shared), student.model, teacher, seed_for=ctx.seed_for)
    data = [encode(component) for component in params.data]
    task = data_task(
        student.model,
        terms,
        data,
        [component.weight for component in params.data],
        seed=ctx.seed_for("data-order"),
        held_out=[row for component in params.eval_data or () for row in encode(component)[: params.eval_rows]],
        signals=_signals(teacher, teacher_layers(terms)),
        on_policy=_on_policy(params, ctx, student, encoder, shared, compute),
    )
    if fixed is not None:
        fixed.check_rows([row for rows in (*data, task.held_out) for row in rows])
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
            vocabulary=shared if uses_teacher(loss.found.spec) else None,
            kind=loss.found.spec.loss_kind,  # type: ignore[attr-defined]
            teacher=uses_teacher(loss.found.spec),
        )
        for loss in params.losses
    ]


def _signals(teacher: Teacher | None, layers: Sequence[int]) -> Callable[[TokenBatch], TeacherSignals] | None:
    """The teacher's view of a batch, with the hidden states of ``layers``."""
    if teacher is None or not layers:
        return None if teacher is None else teacher.signals
    return partial(cast("HiddenTeacher", teacher).signals, layers=layers)


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
    positions: tuple[int | None, int | None],
) -> Sequence[Encoded]:
    """Rows of a dataset in the student's tokens, and in the teacher's own when it has a ``reader``."""
    rows, name = ctx.load(component), f"dataset {component.name}"
    limits: dict[str, Any] = {"max_length": params.max_length, "overlong": params.overlong}
    if reader is not None and isinstance(encoder, CutEncoder):
        return encode_aligned(rows.examples, encoder, reader, log=ctx.log, name=name, positions=positions, **limits)
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

"""The minillm stage: prompts, rollouts, the streams of a step, and the shared loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from kdkit.api.artifacts import Model
from kdkit.api.errors import StageError
from kdkit.models.chat import ChatEncoder
from kdkit.models.load import check_same_vocabulary, vocabulary
from kdkit.models.positions import positions
from kdkit.plugins.stages.minillm_plugin import makes_advantages
from kdkit.plugins.stages.own_answers import Room, answers_of, load_prompts
from kdkit.plugins.stages.served import check_same_teacher
from kdkit.plugins.stages.training import Student, load_student, save_student, stop_where_trained
from kdkit.train.batching import DataOrder
from kdkit.train.divergences import forward_kl, log_classes, reverse_kl
from kdkit.train.encoding import encode_rows
from kdkit.train.loop import Task, train
from kdkit.train.objective import LossTerm
from kdkit.train.policy.buffer import RolloutBuffer
from kdkit.train.policy.dropout import without_dropout
from kdkit.train.policy.returns import Estimator
from kdkit.train.policy.rollouts import Answers, MiniLLMRollouts
from kdkit.train.policy.scoring import Scorer
from kdkit.train.rollout import Mixture, stop_ids
from kdkit.train.streams import DataRows, Stream

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import Component, StageContext, Teacher, TokenLossInputs
    from kdkit.api.protocols import DatasetLoader, StageOutputs
    from kdkit.models.chat import Encoded
    from kdkit.plugins.stages.minillm_plugin import MiniLLMStageParams

__all__ = ["estimator_of", "run"]


def run(params: MiniLLMStageParams, ctx: StageContext) -> StageOutputs:
    """Train on the student's own answers.

    Raises:
        ModelError: Teacher and student have different vocabularies.
        DataError: No prompt is left.
    """
    student = load_student(params.model, ctx)
    teacher = ctx.build(params.teacher)
    try:
        shared = check_same_vocabulary(vocabulary(student.tokenizer, student.model), teacher.vocabulary)
        check_same_teacher(teacher, ctx)
        return {"model": _Stage(params, ctx, student, teacher, shared).run()}
    finally:
        teacher.close()


@dataclass(frozen=True, slots=True)
class _Stage:
    """What the parts of the stage have in common; ``shared``: leading entries that both models have."""

    params: MiniLLMStageParams
    ctx: StageContext
    student: Student
    teacher: Teacher
    shared: int

    @property
    def readable(self) -> tuple[int | None, int | None]:
        """How many tokens student and teacher can read."""
        return positions(self.student.model.config), getattr(self.teacher, "positions", None)

    def run(self) -> Model:
        params, ctx, student = self.params, self.ctx, self.student
        encoder = ChatEncoder(student.tokenizer)
        # Before the work: what cannot be saved afterwards must not be found out afterwards.
        stop_where_trained(student.model, encoder)
        precision = ctx.precision(params.precision)
        compute = torch.bfloat16 if precision == "bf16" else torch.float32
        rows = partial(_rows, encoder=encoder, params=params, ctx=ctx, readable=self.readable)
        streams = [self._own(encoder, compute), *self._lm(rows)]
        held_out = [row for component in params.eval_data or () for row in rows(component)[: params.eval_rows]]
        with without_dropout(student.model):
            result = train(Task(student.model, streams, held_out), params, ctx, compute=compute)
        method = f"{', '.join(loss.name for loss in params.losses)} on its own answers"
        return save_student(params, ctx, student, result, precision=precision, method=method)

    def _own(self, encoder: ChatEncoder, compute: torch.dtype) -> Stream:
        """The student's own answers."""
        params, ctx, model = self.params, self.ctx, self.student.model
        room = Room(
            params.max_length, params.sampling.max_new_tokens, params.overlong, "sampling.max_new_tokens", self.readable
        )
        prompts = [load_prompts(component, encoder, ctx, room) for component in params.data]
        weights = [component.weight for component in params.data]
        rollouts = MiniLLMRollouts(
            model=model,
            prompts=prompts,
            order=DataOrder([len(part) for part in prompts], weights, ctx.seed_for("data-order")),
            count=params.num_rollouts,
            seed=ctx.seed_for("rollouts"),
            answers=self._answers(encoder, compute),
            stop_ids=stop_ids(model, encoder),
            scorer=Scorer(
                model,
                self.teacher.signals,
                params.teacher.name,
                params.sampling.temperature,
                self.shared,
                compute,
                batch_size=params.per_device_train_batch_size,
                padding_free=params.padding_free,
            ),
            estimator=estimator_of(params),
            log=ctx.log,
            reads_teacher=any(makes_advantages(loss) for loss in params.losses),
        )
        buffer = RolloutBuffer(
            rollouts.make,
            num_rollouts=params.num_rollouts,
            ppo_epochs=params.ppo_epochs,
            seed=ctx.seed_for("rollout-order"),
            per_pass=sum(map(len, prompts)),
            facts=rollouts.facts,
        )
        signals = self.teacher.signals if params.decomposes else None
        return Stream(list(self._terms()), buffer, signals, params.sampling.temperature)

    def _terms(self) -> Iterator[LossTerm]:
        for loss in self.params.losses:
            yield LossTerm(loss.name, loss.weight, self.ctx.build(loss), self.shared, "policy")
        if self.params.decomposes:
            yield LossTerm("single-step", self.params.minillm_weight, _reverse_kl, self.shared, sampled=True)

    def _lm(self, rows: Any) -> Iterator[Stream]:
        """The data that the student must not forget."""
        params = self.params
        if params.lm_data is None:
            return
        terms = []
        if params.kd_ratio < 1:
            terms.append(LossTerm("lm/cross-entropy", params.lm_coef * (1 - params.kd_ratio), _cross_entropy))
        if params.kd_ratio:
            terms.append(LossTerm("lm/forward-kl", params.lm_coef * params.kd_ratio, _forward_kl, self.shared))
        weights = [component.weight for component in params.lm_data]
        source = DataRows([rows(component) for component in params.lm_data], weights, self.ctx.seed_for("lm-order"))
        yield Stream(terms, source, self.teacher.signals if params.kd_ratio else None)

    def _answers(self, encoder: ChatEncoder, compute: torch.dtype) -> Answers:
        """Decoding by the engine of the recipe."""
        params = self.params
        mixture = Mixture(self._mixed_in(), params.alpha) if params.alpha else None
        return answers_of(
            params.rollout,
            self.ctx,
            self.student,
            encoder,
            params.sampling,
            vocabulary=self.shared,
            compute=compute,
            mixture=mixture,
        )

    def _mixed_in(self) -> Any:
        model = getattr(self.teacher, "model", None)
        if model is None:
            raise StageError(
                f"the teacher '{self.params.teacher.name}' has no model that can take part in the sampling",
                hint="set teacher_mixed_alpha: 0, or use the teacher local",
            )
        return model


def estimator_of(params: MiniLLMStageParams) -> Estimator:
    """What the parameters say about rewards, returns and weights."""
    return Estimator(
        alpha=params.alpha,
        gamma=params.gamma,
        reward_scaling=params.reward_scaling,
        cliprange_reward=params.cliprange_reward,
        length_normalization=params.length_norm,
        single_step_decomposition=params.decomposes,
        parity=params.parity,
        importance=params.importance,
        whiten=params.whiten,
        width=params.sampling.max_new_tokens,
    )


def _rows(
    component: Component[DatasetLoader],
    *,
    encoder: ChatEncoder,
    params: MiniLLMStageParams,
    ctx: StageContext,
    readable: tuple[int | None, int | None],
) -> list[Encoded]:
    """Rows of data with their answers."""
    return encode_rows(
        ctx.load(component).examples,
        encoder,
        max_length=params.max_length,
        overlong=params.overlong,
        log=ctx.log,
        name=f"dataset {component.name}",
        positions=readable,
    )


def _reverse_kl(x: TokenLossInputs) -> Tensor:
    return reverse_kl(*log_classes(x, 1.0))


def _forward_kl(x: TokenLossInputs) -> Tensor:
    return forward_kl(*log_classes(x, 1.0))


def _cross_entropy(x: TokenLossInputs) -> Tensor:
    return torch.nn.functional.cross_entropy(x.student_logits, x.labels, reduction="none")

"""The grpo stage: prompts, completions, rewards, and the shared loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState

from kdkit.models.chat import ChatEncoder
from kdkit.models.load import load_model, vocabulary
from kdkit.models.positions import positions
from kdkit.plugins.stages.own_answers import Room, answers_of, load_prompts
from kdkit.plugins.stages.training import Student, load_student, save_student, stop_where_trained
from kdkit.train.batching import DataOrder
from kdkit.train.loop import Task, train
from kdkit.train.objective import LossTerm
from kdkit.train.policy.buffer import RolloutBuffer
from kdkit.train.policy.dropout import without_dropout
from kdkit.train.policy.grpo import GroupRollouts
from kdkit.train.policy.records import Record, write_records
from kdkit.train.policy.scoring import Scorer
from kdkit.train.rewards import RewardSet
from kdkit.train.rollout import stop_ids
from kdkit.train.streams import Stream

if TYPE_CHECKING:
    from kdkit.api import StageContext
    from kdkit.api.artifacts import Model
    from kdkit.api.protocols import StageOutputs
    from kdkit.plugins.stages.grpo_plugin import GRPOStageParams

__all__ = ["run"]


def run(params: GRPOStageParams, ctx: StageContext) -> StageOutputs:
    """Train on the student's own completions, by rewards.

    Raises:
        EnvironmentUnmet: A sandbox that a reward names does not work here.
        DataError: No prompt is left.
    """
    # First of all: without what judges the completions the work must not begin.
    rewards = RewardSet.build(params.rewards, ctx)
    try:
        return {"model": _Stage(params, ctx, load_student(params.model, ctx), rewards).run()}
    finally:
        rewards.close()


@dataclass(frozen=True, slots=True)
class _Stage:
    """What the parts of the stage have in common."""

    params: GRPOStageParams
    ctx: StageContext
    student: Student
    rewards: RewardSet

    def run(self) -> Model:
        params, ctx, student = self.params, self.ctx, self.student
        encoder = ChatEncoder(student.tokenizer)
        # Before the work: what cannot be saved afterwards must not be found out afterwards.
        stop_where_trained(student.model, encoder)
        precision = ctx.precision(params.precision)
        compute = torch.bfloat16 if precision == "bf16" else torch.float32
        buffer = self._buffer(self._rollouts(encoder, compute))
        stream = Stream(self._terms(), buffer, temperature=params.temperature)
        with without_dropout(student.model):
            result = train(Task(student.model, [stream]), params, ctx, compute=compute)
        rewarded = ", ".join(term.name for term in self.rewards.terms)
        method = f"{', '.join(loss.name for loss in params.losses)} with rewards {rewarded}"
        return save_student(params, ctx, student, result, precision=precision, method=method)

    def _terms(self) -> list[LossTerm]:
        return [LossTerm(loss.name, loss.weight, self.ctx.build(loss), kind="policy") for loss in self.params.losses]

    def _buffer(self, rollouts: GroupRollouts) -> RolloutBuffer:
        params = self.params
        return RolloutBuffer(
            rollouts.make,
            num_rollouts=params.num_rollouts,
            ppo_epochs=params.num_iterations,
            seed=self.ctx.seed_for("rollout-order"),
            per_pass=sum(map(len, rollouts.prompts)) * params.num_generations,
            facts=rollouts.facts,
        )

    def _rollouts(self, encoder: ChatEncoder, compute: torch.dtype) -> GroupRollouts:
        params, ctx, student = self.params, self.ctx, self.student
        readable = positions(student.model.config), None
        longest = params.max_completion_length
        room = Room(params.max_length, longest, params.overlong, "max_completion_length", readable)
        prompts = [load_prompts(component, encoder, ctx, room) for component in params.data]
        sizes, weights = [len(part) for part in prompts], [component.weight for component in params.data]
        size = vocabulary(student.tokenizer, student.model).size
        return GroupRollouts(
            model=student.model,
            tokenizer=student.tokenizer,
            prompts=prompts,
            order=DataOrder(sizes, weights, ctx.seed_for("data-order")),
            spare=DataOrder(sizes, weights, ctx.seed_for("spare-order")),
            groups=params.num_rollouts // params.num_generations,
            size=params.num_generations,
            seed=ctx.seed_for("rollouts"),
            answers=answers_of(
                params.rollout, ctx, student, encoder, params.sampling, vocabulary=size, compute=compute
            ),
            stop_ids=stop_ids(student.model, encoder),
            scorer=self._scorer(size, compute),
            rewards=self.rewards,
            scale=params.scale_rewards,
            mask_truncated=params.mask_truncated_completions,
            tries=params.resample_groups,
            first_step=self._first_step,
            keep=self._keep,
            log=ctx.log,
        )

    def _scorer(self, size: int, compute: torch.dtype) -> Scorer:
        """The reference is what the stage starts from, read again: a resumed student is another one by now."""
        params, reference = self.params, None
        if params.needs_reference:
            reference = load_model(self.student.artifact, dtype=compute)
        return Scorer(
            self.student.model,
            None,
            "",
            params.temperature,
            size,
            compute,
            batch_size=params.per_device_train_batch_size,
            padding_free=params.padding_free,
            reference=reference,
        )

    def _first_step(self, iteration: int) -> int:
        """Optimiser steps before an iteration."""
        params = self.params
        rows = params.per_device_train_batch_size * params.gradient_accumulation_steps * PartialState().num_processes
        return int(iteration * (params.num_rollouts // rows) * params.num_iterations)

    def _keep(self, records: Sequence[Record]) -> None:
        if PartialState().is_main_process:
            write_records(self.ctx.out / "rollouts", records)

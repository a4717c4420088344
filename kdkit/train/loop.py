"""The one training loop. Stages differ in the objective they hand to it, not in how they train."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from kdkit.api.data import TokenBatch
from kdkit.api.errors import StageError, Stopped
from kdkit.train import checkpoint
from kdkit.train.aligned import AlignedSignals, aligned_batch
from kdkit.train.alignment import aligned_rows, group_count
from kdkit.train.batching import DataOrder, collate, micro_batches
from kdkit.train.checkpoint import Progress
from kdkit.train.objective import CausalObjective, LossTerm
from kdkit.train.optim import adamw, learning_rate
from kdkit.train.packing import pack
from kdkit.train.params import TrainParams

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api import StageContext, TeacherSignals
    from kdkit.models.chat import Encoded
    from kdkit.train.on_policy import OnPolicy

__all__ = ["Task", "TrainResult", "train"]

MAX_SKIPPED: Final = 5
"""Consecutive steps with a non-finite gradient before training gives up."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained on what.

    Attributes:
        model: The student, float32 master weights.
        terms: Weighted losses.
        data: Encoded rows of each training dataset, with ``weights``; with an aligned loss all are ``AlignedRow``.
        held_out: Rows for evaluation during training.
        signals: The teacher's view of a batch, when a loss needs it: a batch of the student's tokens, or with an
            aligned loss of the teacher's own.
        on_policy: Replaces answers of the data by the student's own; evaluation keeps to the data.
    """

    model: PreTrainedModel
    terms: Sequence[LossTerm]
    data: Sequence[Sequence[Encoded]]
    weights: Sequence[float]
    held_out: Sequence[Encoded] = ()
    signals: Callable[[TokenBatch], TeacherSignals] | None = None
    on_policy: OnPolicy | None = None


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What happened: steps and learned tokens of all ranks, final evaluation, steps skipped."""

    steps: int
    tokens: int
    skipped: int
    evaluation: dict[str, float]
    best_step: int | None = None


@dataclass(slots=True)
class _Window:
    """Sums since the last log line, kept as tensors so that no micro-step waits for the device."""

    sums: Tensor
    tokens: int = 0
    groups: int = 0
    positions: int = 0
    started: float = field(default_factory=time.monotonic)


def total_steps(params: TrainParams, rows: int, world: int) -> int:
    """Optimiser steps of the whole training."""
    if params.max_steps is not None:
        return params.max_steps
    batch = params.per_device_train_batch_size * params.gradient_accumulation_steps * world
    return max(1, math.ceil(params.num_train_epochs * rows / batch))


def train(task: Task, params: TrainParams, ctx: StageContext, *, compute: torch.dtype) -> TrainResult:
    """Train ``task.model`` in place.

    Raises:
        StageError: Gradients stay non-finite.
        Stopped: A signal asked for it; a checkpoint of the last finished step was saved.
    """
    return _Training(task, params, ctx, compute).run()


class _Training:
    """State of one training run: the wrapped objective, its optimiser and where it is."""

    def __init__(self, task: Task, params: TrainParams, ctx: StageContext, compute: torch.dtype) -> None:
        self.task, self.params, self.ctx = task, params, ctx
        # Both are said outright: accelerate would otherwise read them from the environment and scale the gradient.
        self.accelerator = Accelerator(
            cpu=ctx.device == "cpu",
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        if params.gradient_checkpointing:
            task.model.gradient_checkpointing_enable({"use_reentrant": False})
        objective = CausalObjective(task.model, task.terms, compute=compute)
        optimizer = adamw(objective, params)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        if params.padding_free and not objective.isolates():
            ctx.log(f"{type(task.model).__name__} sees across rows that lie end to end: they are padded")
        self.order = DataOrder([len(rows) for rows in task.data], task.weights, ctx.seed_for("data-order"))
        self.batch = params.per_device_train_batch_size * params.gradient_accumulation_steps
        self.progress = Progress(total_steps(params, self.order.rows, self.world))
        self.window = self._new_window()

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    def run(self) -> TrainResult:
        checkpoint.check_space(self.ctx.checkpoints, self.task.model)
        torch.manual_seed(self.ctx.seed_for("dropout") + self.accelerator.process_index)
        self._resume()
        evaluation: dict[str, float] = {}
        while self.progress.step < self.progress.total_steps:
            self._step()
            done = self.progress.step
            last = done == self.progress.total_steps
            if done % self.params.logging_steps == 0 or last:
                self._log()
            if self._evaluates(done) and self._improved(evaluation := self._evaluate()):
                break
            if not last and (done % self.params.save_steps == 0 or self.ctx.stopping()):
                written = self._save()
                if self.ctx.stopping():
                    raise Stopped(f"stopped after step {done}, checkpoint {'saved' if written else 'NOT saved'}")
        return self._finish(evaluation)

    def _step(self) -> None:
        """One optimiser step. Its gradient is that of one batch, however it is cut into micro-batches and ranks."""
        rows = self._rows(self.progress.step)
        tokens, groups = self._all_ranks(sum(row.targets for row in rows)), self._all_ranks(group_count(rows))
        rate = learning_rate(self.progress.step, self.progress.total_steps, self.params)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.train()
        sums = torch.zeros_like(self.window.sums)
        batches = list(micro_batches(rows, self.params.per_device_train_batch_size))
        for index, part in enumerate(batches):
            batch, signals = self._inputs(part)
            with nullcontext() if index == len(batches) - 1 else self.accelerator.no_sync(self.objective):
                measured = self.objective(batch, signals, self.world / max(tokens, 1), self.world / max(groups, 1))
                self.accelerator.backward(measured.loss)
            sums += measured.sums
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.params.max_grad_norm)
        if self._apply(norm, rows):
            self.window.sums += sums
            self.window.tokens += tokens
            self.window.groups += groups
            self.progress.tokens += tokens
        self.window.positions += self._all_ranks(sum(len(row.ids) for row in rows))
        self.progress.step += 1

    def _inputs(self, part: Sequence[Encoded]) -> tuple[TokenBatch, TeacherSignals | AlignedSignals | None]:
        """The student's batch, and the teacher's view of it or of the same text."""
        signals = self.task.signals
        if signals is not None and any(term.kind == "aligned" for term in self.task.terms):
            return aligned_batch(aligned_rows(part), self._batch, signals)
        batch = self._batch(part)
        return batch, None if signals is None else signals(batch)

    def _batch(self, part: Sequence[Encoded]) -> TokenBatch:
        device = self.accelerator.device
        if not self.params.padding_free:
            return collate(part, device=device)
        return pack(part, device=device, limit=getattr(self.task.model.config, "max_position_embeddings", None))

    def _rows(self, step: int) -> list[Encoded]:
        """This rank's rows of a step, as they are learned."""
        places = range(self.accelerator.process_index, self.batch * self.world, self.world)
        of_step = self.order.rows_of_step(step, self.batch * self.world)
        rows = [self.task.data[dataset][row] for dataset, row in (of_step[place] for place in places)]
        policy = self.task.on_policy
        return rows if policy is None else policy.rows(step, rows, places)

    def _apply(self, norm: Tensor | float | None, rows: Sequence[Encoded]) -> bool:
        """Update the weights unless the gradient is not finite; whether they were updated."""
        finite = norm is not None and math.isfinite(float(norm))
        if finite:
            self.optimizer.step()
            self.progress.skipped_in_row = 0
        else:
            self.progress.skipped += 1
            self.progress.skipped_in_row += 1
            self.ctx.log(f"step {self.progress.step + 1}: gradient norm is {norm}, step skipped")
        self.optimizer.zero_grad(set_to_none=True)
        if self.progress.skipped_in_row >= MAX_SKIPPED:
            raise StageError(
                f"the gradient was not finite in {MAX_SKIPPED} steps in a row, last with rows "
                f"{', '.join(row.id for row in rows[:4])}",
                hint="lower learning_rate, or set precision: fp32",
            )
        return finite

    def _log(self) -> None:
        seconds = max(time.monotonic() - self.window.started, 1e-9)
        values = self._means(self.window.sums, self.window.tokens, self.window.groups)
        speed = self.window.positions / seconds
        if self.task.on_policy is not None:
            values |= self.task.on_policy.metrics(self._all_ranks)
        step, total = self.progress.step, self.progress.total_steps
        rate = learning_rate(step - 1, total, self.params)
        self.ctx.metrics(
            {**{f"train/{k}": v for k, v in values.items()}, "train/learning_rate": rate, "train/tokens_per_s": speed,
             "train/learned_tokens": self.progress.tokens},
            step=step,
        )  # fmt: skip
        self.ctx.progress(step, total, loss=values["loss"], tokens_per_s=speed)
        self.window = self._new_window()

    def _means(self, sums: Tensor, tokens: int, groups: int) -> dict[str, float]:
        """Means of every loss over its tokens or groups, and their weighted sum, over all ranks."""
        total = self.accelerator.reduce(sums.clone(), "sum")
        counts = [groups if term.kind == "aligned" else tokens for term in self.task.terms]
        means = [float(v) / max(count, 1) for v, count in zip(total, counts, strict=True)]
        named = {term.name: mean for term, mean in zip(self.task.terms, means, strict=True)}
        return {"loss": sum(t.weight * m for t, m in zip(self.task.terms, means, strict=True)), **named}

    def _new_window(self) -> _Window:
        return _Window(torch.zeros(len(self.task.terms), device=self.accelerator.device))

    def _evaluates(self, done: int) -> bool:
        every = self.params.eval_steps
        return bool(self.task.held_out) and (
            done == self.progress.total_steps or (every is not None and done % every == 0)
        )

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self.objective.eval()
        rows = self.task.held_out[self.accelerator.process_index :: self.world]
        sums, tokens, groups = self._new_window().sums, 0, 0
        for part in micro_batches(rows, self.params.per_device_train_batch_size):
            measured = self.objective(*self._inputs(part), 1.0, 1.0)
            sums += measured.sums
            tokens, groups = tokens + measured.tokens, groups + measured.groups
        values = self._means(sums, self._all_ranks(tokens), self._all_ranks(groups))
        self.ctx.metrics({f"eval/{k}": v for k, v in values.items()}, step=self.progress.step)
        return values

    def _improved(self, values: dict[str, float]) -> bool:
        """Keep the weights when they are the best so far; True when patience has run out."""
        watched = self.params.metric_for_best_model
        if watched is None:
            return False
        progress = self.progress
        if progress.best is None or values[watched] < progress.best:
            # Weights that could not be kept are no best ones: the step before stays the one to go back to.
            if checkpoint.save_best(self.ctx.checkpoints, self._bare(), progress.step, self.ctx.log):
                progress.best, progress.best_step, progress.best_values = values[watched], progress.step, values
            progress.patience = 0
        else:
            self.progress.patience += 1
        limit = self.params.early_stopping_patience
        return limit is not None and self.progress.patience >= limit

    def _finish(self, evaluation: dict[str, float]) -> TrainResult:
        best = self.progress.best_step or None
        if best is not None and best != self.progress.step:
            checkpoint.load_best(self.ctx.checkpoints, self._bare())
            evaluation = self.progress.best_values
            self.ctx.log(f"kept the weights of step {best}, best {self.params.metric_for_best_model}")
        return TrainResult(self.progress.step, self.progress.tokens, self.progress.skipped, evaluation, best)

    def _resume(self) -> None:
        found = checkpoint.latest(self.ctx.checkpoints, self.ctx.log)
        if found is not None:
            self.progress = checkpoint.load(
                found, self._bare(), self.optimizer.optimizer, total_steps=self.progress.total_steps
            )
            self.ctx.log(f"resumed at step {self.progress.step} of {self.progress.total_steps}")

    def _save(self) -> bool:
        bare, optimizer = self._bare(), self.optimizer.optimizer
        return checkpoint.save(self.ctx.checkpoints, bare, optimizer, self.progress, self.ctx.log)

    def _bare(self) -> Any:
        return self.accelerator.unwrap_model(self.objective).model

    def _all_ranks(self, value: int) -> int:
        if self.world == 1:
            return value
        return int(self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), "sum"))

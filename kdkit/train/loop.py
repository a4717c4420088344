"""The one training loop. Stages differ in the objective they hand to it, not in how they train."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from kdkit.api.data import TokenBatch
from kdkit.api.errors import StageError, Stopped
from kdkit.train import checkpoint
from kdkit.train.batching import collate, micro_batches
from kdkit.train.checkpoint import Progress
from kdkit.train.objective import CausalObjective, LossTerm, Measured
from kdkit.train.optim import adamw, learning_rate
from kdkit.train.packing import pack
from kdkit.train.params import TrainParams
from kdkit.train.streams import Counts, DataRows, Share, Stream
from kdkit.train.sums import Sums

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api import StageContext, TeacherSignals
    from kdkit.models.chat import Encoded
    from kdkit.train.on_policy import OnPolicy

__all__ = ["Task", "TrainResult", "data_task", "train"]

MAX_SKIPPED: Final = 5
"""Consecutive steps with a non-finite gradient before training gives up."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained on what.

    Attributes:
        model: The student, float32 master weights.
        streams: What every step learns from. The length of an epoch is that of the first one.
        held_out: Rows of data for evaluation during training, by the losses of the last stream; a policy loss, which
            needs the student's own completions, is left out.
    """

    model: PreTrainedModel
    streams: Sequence[Stream]
    held_out: Sequence[Encoded] = ()

    @property
    def terms(self) -> list[LossTerm]:
        """The losses of all streams, in order."""
        return [term for stream in self.streams for term in stream.terms]


def data_task(
    model: PreTrainedModel,
    terms: Sequence[LossTerm],
    data: Sequence[Sequence[Encoded]],
    weights: Sequence[float],
    *,
    seed: int,
    held_out: Sequence[Encoded] = (),
    signals: Callable[[TokenBatch], TeacherSignals] | None = None,
    on_policy: OnPolicy | None = None,
) -> Task:
    """Training on datasets alone, mixed by ``weights`` in an order that follows from ``seed``.

    With an aligned loss all rows are ``AlignedRow``. For the other arguments see :class:`Task`,
    :class:`kdkit.train.streams.Stream` and :class:`kdkit.train.streams.DataRows`.
    """
    return Task(model, [Stream(terms, DataRows(data, weights, seed, on_policy), signals)], held_out)


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
    """What happened since the last log line."""

    sums: Sums
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
        self.batch = params.per_device_train_batch_size * params.gradient_accumulation_steps
        self.progress = Progress(total_steps(params, task.streams[0].source.size, self.world))
        self.window = self._new_window()

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def share(self) -> Share:
        """This rank's part of every batch."""
        return Share(self.batch * self.world, self.accelerator.process_index, self.world)

    def run(self) -> TrainResult:
        checkpoint.check_space(self.ctx.checkpoints, self._kept())
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
        counts = [Counts.of(part, self._all_ranks) for part in rows]
        rate = learning_rate(self.progress.step, self.progress.total_steps, self.params)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.objective.train()
        sums = self._zero()
        parts = [
            (index, part)
            for index, of_stream in enumerate(rows)
            for part in micro_batches(of_stream, self.params.per_device_train_batch_size)
        ]
        for done, (index, part) in enumerate(parts, 1):
            with nullcontext() if done == len(parts) else self.accelerator.no_sync(self.objective):
                measured = self._measure(self.task.streams[index], part, *counts[index].scales(self.world))
                self.accelerator.backward(measured.loss)
            sums.add(measured, self._first(index))
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.params.max_grad_norm)
        learned = [row for of_stream in rows for row in of_stream]
        if self._apply(norm, learned):
            self.window.sums.merge(sums)
            self.progress.tokens += sum(count.tokens for count in counts)
        self.window.positions += self._all_ranks(sum(len(row.ids) for row in learned))
        self.progress.step += 1

    def _measure(
        self, stream: Stream, part: Sequence[Encoded], scale: float, group_scale: float, sequence_scale: float
    ) -> Measured:
        """The losses of a stream on a micro-batch."""
        x = stream.inputs(part, self._batch)
        more = {"terms": stream.terms, "policy": x.policy, "sequence_scale": sequence_scale}
        measured: Measured = self.objective(x.batch, x.signals, scale, group_scale, **more)
        return measured

    def _batch(self, part: Sequence[Encoded]) -> TokenBatch:
        device = self.accelerator.device
        if not self.params.padding_free:
            return collate(part, device=device)
        return pack(part, device=device, limit=getattr(self.task.model.config, "max_position_embeddings", None))

    def _rows(self, step: int) -> list[list[Encoded]]:
        """This rank's rows of a step, of every stream."""
        return [stream.source.rows(step, self.share) for stream in self.task.streams]

    def _first(self, stream: int) -> int:
        """Where the losses of a stream start among all losses."""
        return sum(len(before.terms) for before in self.task.streams[:stream])

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
        values = self._means(self.window.sums, self.task.terms)
        speed = self.window.positions / seconds
        for stream in self.task.streams:
            values |= stream.source.metrics(self._all_ranks)
        step, total = self.progress.step, self.progress.total_steps
        rate = learning_rate(step - 1, total, self.params)
        self.ctx.metrics(
            {**{f"train/{k}": v for k, v in values.items()}, "train/learning_rate": rate, "train/tokens_per_s": speed,
             "train/learned_tokens": self.progress.tokens},
            step=step,
        )  # fmt: skip
        self.ctx.progress(step, total, loss=values["loss"], tokens_per_s=speed)
        self.window = self._new_window()

    def _means(self, sums: Sums, terms: Sequence[LossTerm]) -> dict[str, float]:
        """Means of every loss over its tokens, groups or sequences, and their weighted sum, over all ranks."""
        total = self.accelerator.reduce(sums.values.clone(), "sum")
        means = [float(v) / max(self._all_ranks(n), 1) for v, n in zip(total, sums.counts, strict=True)]
        named = {term.name: mean for term, mean in zip(terms, means, strict=True)}
        # Every rank has called the same losses, which name the same things.
        for name, (value, tokens) in sorted(sums.metrics.items()):
            named[name] = float(self.accelerator.reduce(value.clone(), "sum")) / max(self._all_ranks(tokens), 1)
        return {"loss": sum(t.weight * m for t, m in zip(terms, means, strict=True)), **named}

    def _zero(self) -> Sums:
        return Sums.zero(len(self.task.terms), self.accelerator.device)

    def _new_window(self) -> _Window:
        return _Window(self._zero())

    def _evaluates(self, done: int) -> bool:
        every = self.params.eval_steps
        measurable = any(term.kind != "policy" for term in self.task.streams[-1].terms)
        return bool(self.task.held_out and measurable) and (
            done == self.progress.total_steps or (every is not None and done % every == 0)
        )

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        self.objective.eval()
        last = self.task.streams[-1]
        stream = replace(last, terms=[term for term in last.terms if term.kind != "policy"])
        sums = Sums.zero(len(stream.terms), self.accelerator.device)
        rows = self.task.held_out[self.accelerator.process_index :: self.world]
        for part in micro_batches(rows, self.params.per_device_train_batch_size):
            sums.add(self._measure(stream, part, 1.0, 1.0, 1.0), 0)
        values = self._means(sums, stream.terms)
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
                found, self._kept(), self.optimizer.optimizer, total_steps=self.progress.total_steps
            )
            for index, stream in enumerate(self.task.streams):
                stream.source.restore(checkpoint.load_state(found, _name(index)), self.progress.step, self.share)
            self.ctx.log(f"resumed at step {self.progress.step} of {self.progress.total_steps}")

    def _save(self) -> bool:
        kept, optimizer = self._kept(), self.optimizer.optimizer
        states = {
            _name(index): state
            for index, stream in enumerate(self.task.streams)
            if (state := stream.source.state(self.progress.step, self.share)) is not None
        }
        return checkpoint.save(self.ctx.checkpoints, kept, optimizer, self.progress, self.ctx.log, states)

    def _bare(self) -> Any:
        return self.accelerator.unwrap_model(self.objective).model

    def _kept(self) -> torch.nn.Module:
        """What checkpoints hold: the model, together with the projectors of its losses where there are any."""
        objective: CausalObjective = self.accelerator.unwrap_model(self.objective)
        return objective if len(objective.matches) else objective.model

    def _all_ranks(self, value: int) -> int:
        if self.world == 1:
            return value
        return int(self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), "sum"))


def _name(stream: int) -> str:
    """What the state of a stream's rows is called in a checkpoint."""
    return f"rows-{stream}"

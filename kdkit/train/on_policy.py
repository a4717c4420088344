"""On-policy mixing (GKD: Agarwal et al. 2024, "On-Policy Distillation of Language Models", algorithm 1).

In a share of the optimiser steps the student learns from answers that it gave itself, just then, to the prompts of that
step. It is asked about the states it really gets into, which the data's answers do not show.

Everything is a function of (seed, step, place of a row in the step): a resumed training, or one that is cut into other
micro-batches, makes the same choices and draws the same answers. No gradient flows through the sampling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from kdkit.models.chat import Encoded
from kdkit.train.rollout import generate_ids, stream_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdkit.api import Sampling

__all__ = ["OnPolicy", "as_deployed", "prompt_of"]

_BATCH: Final = 32
"""Rows decoded together. Not the micro-batch: in bf16 the rounding, and so an answer, would depend on it."""


@dataclass(slots=True)
class _Tally:
    """What was sampled since the last log line, on this rank."""

    steps: int = 0
    on_policy: int = 0
    answers: int = 0
    tokens: int = 0
    truncated: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class OnPolicy:
    """Decides which steps are on-policy, and lets the live student answer in them.

    Attributes:
        model: The student that is being trained, on its device and in whatever mode it is.
        sampling: How it answers.
        share: Probability (lambda) that a step is on-policy.
        seed: What the choices and the answers derive from.
        stop_ids: Ids that end an answer.
        max_length: Bound of prompt and answer together; every prompt is shorter.
        compute: Precision of the weights while the student answers; that of its training forward.
        vocabulary: The student answers with this many leading ids only: those that the teacher knows.
    """

    model: PreTrainedModel
    sampling: Sampling
    share: float
    seed: int
    stop_ids: Sequence[int]
    max_length: int
    compute: torch.dtype
    vocabulary: int | None = None
    _tally: _Tally = field(default_factory=_Tally)

    def chosen(self, step: int) -> bool:
        """Whether the step with this index (from 0) is on-policy, for all of its rows and on all ranks."""
        # 53 bits are what a float in [0, 1) can hold: with a share of 1 no rounding makes a draw miss it.
        return (self._number("step", step) >> 10) / 2**53 < self.share

    def rows(self, step: int, rows: Sequence[Encoded], places: Sequence[int]) -> list[Encoded]:
        """The rows to learn from in a step: those of the data, or the same prompts with the student's own answers.

        Ids stay. The end token is learned where the answer ended, also alone; a truncated answer has none.

        Args:
            step: Index of the optimiser step, from 0.
            rows: This rank's rows of the data.
            places: Where each of them stands among all rows of the step.
        """
        self._tally.steps += 1
        if not self.chosen(step):
            return list(rows)
        started = time.monotonic()
        prompts = [prompt_of(row) for row in rows]
        answers = self._answers(prompts, [self._number("row", step, place) for place in places])
        self._count(answers, time.monotonic() - started)
        return [_answered(*parts) for parts in zip(rows, prompts, answers, strict=True)]

    def metrics(self, all_ranks: Callable[[int], int]) -> dict[str, float]:
        """What happened since the last call; ``all_ranks`` sums a count over ranks.

        ``on_policy_share`` of the steps and the seconds spent on answers; if there were any, the tokens a second of
        this rank, their mean length in learned tokens and the share that was truncated.
        """
        tally, self._tally = self._tally, _Tally()
        answers, tokens, truncated = (all_ranks(n) for n in (tally.answers, tally.tokens, tally.truncated))
        values = {"on_policy_share": tally.on_policy / max(tally.steps, 1), "generation_s": tally.seconds}
        if tally.tokens:
            values["generation_tokens_per_s"] = tally.tokens / max(tally.seconds, 1e-9)
        if answers:
            values |= {"answer_tokens": tokens / answers, "truncated_share": truncated / answers}
        return values

    def _answers(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        with as_deployed(self.model):
            return generate_ids(
                self.model,
                prompts,
                self.sampling,
                seeds,
                stop_ids=self.stop_ids,
                batch_size=_BATCH,
                max_length=self.max_length,
                vocabulary=self.vocabulary,
                compute=self.compute,
            )

    def _count(self, answers: Sequence[Sequence[int]], seconds: float) -> None:
        tally = self._tally
        tally.on_policy += 1
        tally.answers += len(answers)
        tally.tokens += sum(map(len, answers))
        tally.truncated += sum(answer[-1] not in self.stop_ids for answer in answers)
        tally.seconds += seconds

    def _number(self, *parts: object) -> int:
        """63 bits that follow from the seed and ``parts``."""
        return stream_number(self.seed, *parts)


def prompt_of(row: Encoded) -> tuple[int, ...]:
    """Everything before the last answer of a row, which is at least one token."""
    end = len(row.learned) - 1
    while not row.learned[end]:
        end -= 1
    while row.learned[end]:
        end -= 1
    return row.ids[: end + 1]


def _answered(row: Encoded, prompt: Sequence[int], answer: Sequence[int]) -> Encoded:
    return Encoded(row.id, (*prompt, *answer), (*(False for _ in prompt), *(True for _ in answer)))


@contextmanager
def as_deployed(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout (nor gradient checkpointing, which forbids a cache), and without a trace in the RNG states."""
    training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.train(training)

"""Rollouts of MiniLLM: prompts, the student's answers, what both models think of them, advantages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

import torch

from kdkit.api.errors import StageError
from kdkit.train.batching import DataOrder
from kdkit.train.on_policy import as_deployed
from kdkit.train.policy.returns import RULED_OUT, Estimate, Estimator, mixture_weights
from kdkit.train.policy.rows import KeptIds, PolicyRow
from kdkit.train.policy.scoring import Scorer
from kdkit.train.rollout import Decoded, mismatch, stream_seed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api import Example

__all__ = ["Answers", "MiniLLMRollouts", "Prompt", "lengths", "mismatches", "unscored"]

Answers: TypeAlias = "Callable[[Sequence[Sequence[int]], Sequence[int], Sequence[int]], Sequence[Decoded]]"
"""Token ids with the end token for prompts, given a seed and the longest answer of each."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and how many tokens its answer may have; ``id`` is that of the row.

    Rewards see the ``example`` and the prompt as ``text``, as the model reads it.
    """

    id: str
    ids: tuple[int, ...]
    limit: int
    example: Example | None = None
    text: str = ""


@dataclass(slots=True)
class MiniLLMRollouts:
    """Makes the rollouts of an iteration, the same ones on every rank.

    Attributes:
        model: The student that is being trained, in whatever mode it is.
        prompts: Those of every dataset.
        order: Which prompts come when.
        count: Rollouts of an iteration.
        seed: Every answer has a random stream that follows from it, the iteration and its place.
        answers: Decodes.
        stop_ids: Ids that end an answer.
        scorer: Log-probabilities under both models.
        estimator: Advantages and weights.
        log: Takes a line of text.
        reads_teacher: A loss computes with the teacher's log-probabilities themselves, so that none may be -inf.
    """

    model: PreTrainedModel
    prompts: Sequence[Sequence[Prompt]]
    order: DataOrder
    count: int
    seed: int
    answers: Answers
    stop_ids: Sequence[int]
    scorer: Scorer
    estimator: Estimator
    log: Callable[[str], None]
    reads_teacher: bool = False
    _facts: list[dict[str, float]] = field(default_factory=list)

    def make(self, iteration: int) -> list[PolicyRow]:
        """The rollouts of the iteration with this index (from 0), by the student as it is now.

        Raises:
            StageError: An advantage is not finite, or the teacher does not know a sampled token.
        """
        chosen = [self.prompts[dataset][row] for dataset, row in self.order.rows_of_step(iteration, self.count)]
        seeds = [stream_seed(self.seed, iteration, place, 0) for place in range(len(chosen))]
        with as_deployed(self.model):
            started = time.monotonic()
            decoded = self.answers([prompt.ids for prompt in chosen], seeds, [prompt.limit for prompt in chosen])
            seconds = time.monotonic() - started
            rows = [unscored(place, *both) for place, both in enumerate(zip(chosen, decoded, strict=True))]
            rows = self.scorer(rows)
        old, teacher, mask = _padded([row.old_logprobs for row in rows], [row.teacher_logprobs or () for row in rows])
        if self.reads_teacher and not bool(torch.isfinite(teacher).all()):
            raise StageError(RULED_OUT, hint="use the loss minillm alone, with cliprange_reward and single_step: false")
        estimate = self.estimator(teacher, old, mask)
        facts = lengths(decoded, seconds, self.stop_ids) | mismatches(decoded, rows)
        facts |= _credited(teacher, old, mask, estimate, self.estimator.alpha)
        ends = [place for place, answer in enumerate(decoded) if answer.ids[-1] in self.stop_ids]
        if ends:
            last = [float(estimate.advantages[place, rows[place].targets - 1]) for place in ends]
            facts["end_advantage"] = sum(last) / len(last)
        self._facts.append(facts)
        self.log(_line(iteration, len(rows), facts))
        return [_credit(row, place, estimate) for place, row in enumerate(rows)]

    def facts(self) -> Mapping[str, float]:
        """Means over the iterations since the last call; nothing when there was none.

        ``reward`` per token, scaled and clipped; ``reverse_kl_estimate``, the mean of w (log q - log p) over sampled
        tokens; ``importance_weight`` w; ``answer_tokens`` with the end token; ``truncated_share``;
        ``end_advantage``, the mean advantage of end tokens, where there were any: above 0, they get likelier;
        ``generation_tokens_per_s``; and how far decoding is from the forward pass of training (``mismatch_*``, nats).
        """
        made, self._facts = self._facts, []
        names = dict.fromkeys(name for facts in made for name in facts)
        values = {name: [facts[name] for facts in made if name in facts] for name in names}
        return {name: sum(of) / len(of) for name, of in values.items()}


def lengths(decoded: Sequence[Decoded], seconds: float, stop_ids: Sequence[int]) -> dict[str, float]:
    """``answer_tokens`` with the end token, ``truncated_share`` and ``generation_tokens_per_s`` of any answers.

    Args:
        decoded: The answers.
        seconds: What decoding them took.
        stop_ids: Ids that end an answer.
    """
    tokens = sum(len(answer.ids) for answer in decoded)
    truncated = sum(answer.ids[-1] not in stop_ids for answer in decoded)
    return {
        "answer_tokens": tokens / len(decoded),
        "truncated_share": truncated / len(decoded),
        "generation_tokens_per_s": tokens / max(seconds, 1e-9),
    }


def mismatches(decoded: Sequence[Decoded], rows: Sequence[PolicyRow]) -> dict[str, float]:
    """How far decoding is from the forward pass of training in nats; nothing when the engine does not say.

    Args:
        decoded: The answers.
        rows: The same answers with their log-probabilities from the training forward.
    """
    if not all(answer.logprobs for answer in decoded):
        return {}
    recomputed = [torch.tensor(row.old_logprobs, dtype=torch.float64) for row in rows]
    return mismatch([answer.logprobs for answer in decoded], recomputed).metrics()


def unscored(place: int, prompt: Prompt, answer: Decoded) -> PolicyRow:
    """Prompt and answer, whose tokens are learned, the end token included; a truncated answer has none."""
    zeros = (0.0,) * len(answer.ids)
    return PolicyRow(
        id=prompt.id,
        ids=(*prompt.ids, *answer.ids),
        learned=(*(False for _ in prompt.ids), *(True for _ in answer.ids)),
        old_logprobs=zeros,
        advantages=zeros,
        group=place,
        support=None if answer.support is None else KeptIds.of(answer.support),
    )


def _credit(row: PolicyRow, place: int, estimate: Estimate) -> PolicyRow:
    def of(values: Tensor) -> tuple[float, ...]:
        return tuple(values[place, : row.targets].tolist())

    weights, factors = estimate.importance_weights, estimate.token_weights
    return replace(
        row,
        advantages=of(estimate.advantages),
        importance_weights=None if weights is None else of(weights),
        token_weights=None if factors is None else of(factors),
    )


def _padded(old: Sequence[Sequence[float]], teacher: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Both as [B, T] float64, padded with zeros on the right, and which entries are real."""
    lengths = torch.tensor([len(values) for values in old])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    made = []
    for rows in (old, teacher):
        flat = torch.tensor([*chain.from_iterable(rows)], dtype=torch.float64)
        made.append(torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, flat))
    return made[0], made[1], mask


def _credited(teacher: Tensor, old: Tensor, mask: Tensor, estimate: Estimate, alpha: float) -> dict[str, float]:
    weights = mixture_weights(teacher, old, mask, alpha)
    values = {
        "reward": estimate.rewards,
        "reverse_kl_estimate": torch.where(mask, weights * (old - teacher), 0.0),
        "importance_weight": weights,
    }
    return {name: float(value[mask].mean()) for name, value in values.items()}


def _line(iteration: int, count: int, facts: Mapping[str, float]) -> str:
    away = f", {facts['mismatch_mean']:.2g} nats from training" if "mismatch_mean" in facts else ""
    return (
        f"rollouts {iteration + 1}: {count} answers of {facts['answer_tokens']:.1f} tokens, "
        f"{facts['truncated_share']:.0%} truncated, {facts['generation_tokens_per_s']:.0f} tokens/s{away}; "
        f"reward {facts['reward']:.3f}, reverse KL about {facts['reverse_kl_estimate']:.3f} nats/token"
    )

"""Rollouts of GRPO: several completions of every prompt, rewards, advantages within the group."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Literal

import torch

from kdkit.api.data import RewardScore, Rollout
from kdkit.train.batching import DataOrder
from kdkit.train.on_policy import as_deployed
from kdkit.train.policy.advantages import GroupAdvantages, group_advantages
from kdkit.train.policy.ranks import of_first_rank
from kdkit.train.policy.records import Record
from kdkit.train.policy.rollouts import Answers, Prompt, lengths, mismatches, unscored
from kdkit.train.policy.rows import PolicyRow
from kdkit.train.policy.scoring import Scorer
from kdkit.train.rewards import Rewarded, RewardSet
from kdkit.train.rollout import Decoded, completion, stream_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["GroupRollouts"]


@dataclass(frozen=True, slots=True)
class _Judged:
    """A completion and what the rewards say about it."""

    prompt: Prompt
    group: int
    sample: int
    attempt: int
    answer: Decoded
    rollout: Rollout
    total: RewardScore
    parts: Mapping[str, RewardScore]


@dataclass(slots=True)
class _Tally:
    """What was sampled in an iteration, replaced groups included."""

    judged: list[_Judged] = field(default_factory=list)
    decoding: float = 0.0
    judging: float = 0.0
    replaced: int = 0
    clamped: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class GroupRollouts:
    """Makes the rollouts of an iteration, the same ones on every rank.

    Attributes:
        model: The student that is being trained, in whatever mode it is.
        tokenizer: Its tokenizer.
        prompts: Those of every dataset, with the examples that rewards need.
        order: Which prompts come when.
        spare: Which prompts come when a group is replaced.
        groups: Prompts of an iteration.
        size: Completions of a prompt.
        seed: Every completion has a random stream that follows from it, the iteration, its group and its number.
        answers: Decodes.
        stop_ids: Ids that end a completion.
        scorer: Log-probabilities of the student, and of the reference when a loss needs it.
        rewards: What completions are judged by.
        scale: What advantages are divided by; see :func:`kdkit.train.policy.advantages.group_advantages`.
        mask_truncated: Truncated completions are not learned from. They still stand in the baseline of their group.
        tries: How often groups that teach nothing are replaced by those of other prompts.
        first_step: Optimiser steps before an iteration.
        keep: Is given the records of an iteration.
        log: Takes a line of text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Sequence[Prompt]]
    order: DataOrder
    spare: DataOrder
    groups: int
    size: int
    seed: int
    answers: Answers
    stop_ids: Sequence[int]
    scorer: Scorer
    rewards: RewardSet
    scale: Literal["group", "batch", "none"]
    mask_truncated: bool
    tries: int
    first_step: Callable[[int], int]
    keep: Callable[[Sequence[Record]], None]
    log: Callable[[str], None]
    _facts: list[dict[str, float]] = field(default_factory=list)

    def make(self, iteration: int) -> list[PolicyRow]:
        """The rollouts of the iteration with this index (from 0), by the student as it is now.

        Raises:
            StageError: Too many completions could not be judged because of the judge.
            ConformanceError: A reward broke its contract.
        """
        tally = _Tally()
        with as_deployed(self.model):
            chosen = list(chain.from_iterable(self._groups(iteration, tally)))
            rows = [unscored(judged.group, judged.prompt, judged.answer) for judged in chosen]
            rows, entropy = self.scorer.score(rows)
        values = [math.nan if judged.total.value is None else judged.total.value for judged in chosen]
        places = torch.tensor([judged.group for judged in chosen])
        advantages = group_advantages(torch.tensor(values, dtype=torch.float64), places, self.scale)
        numbers = advantages.values.tolist()
        rows = [self._credited(*parts) for parts in zip(rows, chosen, numbers, strict=True)]
        self.keep(self._records(iteration, tally, chosen, numbers))
        facts = self._measured(tally, advantages) | {"entropy": entropy}
        facts["masked_share"] = sum(not row.counts for row in rows) / len(rows)
        self._facts.append(facts | mismatches([judged.answer for judged in chosen], rows))
        self.log(_line(iteration, tally, facts))
        return rows

    def facts(self) -> Mapping[str, float]:
        """Means over the iterations since the last call; nothing when there was none.

        ``reward/NAME/mean`` and ``reward/NAME/std`` of every reward and of the ``total``, over all completions that
        were sampled, and the shares that were ``unscorable`` or an ``infra-error``; ``zero_variance_groups`` and
        ``too_few_groups``, the shares of groups that teach nothing; ``replaced_groups``, those that were replaced,
        over the groups of an iteration; ``masked_share`` of completions that are not learned from; ``entropy`` per
        token in nats; ``answer_tokens`` with the end token; ``truncated_share``; ``generation_tokens_per_s``;
        ``reward_s``; and how far decoding is from the forward pass of training (``mismatch_*``, nats).
        """
        made, self._facts = self._facts, []
        means = {}
        for name in dict.fromkeys(chain.from_iterable(made)):
            values = [facts[name] for facts in made if name in facts]
            # A share is written down where it is not zero; a mean of nothing is no number at all.
            share = name.endswith(("/unscorable", "/infra-error"))
            means[name] = sum(values) / (len(made) if share else len(values))
        return means

    def _groups(self, iteration: int, tally: _Tally) -> list[list[_Judged]]:
        """The groups to learn from: those that teach nothing are replaced as long as there are tries."""
        order = self.order.rows_of_step(iteration, self.groups)
        groups = self._judged(iteration, 0, range(self.groups), order, tally)
        for attempt in range(1, self.tries + 1):
            flat = [place for place, group in enumerate(groups) if not self._teaches(group)]
            if not flat:
                break
            others = self.spare.rows_of_step(iteration * self.tries + attempt - 1, self.groups)
            for place, group in zip(flat, self._judged(iteration, attempt, flat, others, tally), strict=True):
                if self._teaches(group):
                    groups[place] = group
                    tally.replaced += 1
        return groups

    def _judged(
        self, iteration: int, attempt: int, places: Sequence[int], order: Sequence[tuple[int, int]], tally: _Tally
    ) -> list[list[_Judged]]:
        """Groups for these places: the first prompts of ``order``, answered and judged."""
        prompts = [self.prompts[dataset][row] for dataset, row in order[: len(places)]]
        whose = [(place, prompt, k) for place, prompt in zip(places, prompts, strict=True) for k in range(self.size)]
        seeds = [stream_number(self.seed, "group", iteration, attempt, place, k) for place, _, k in whose]
        started = time.monotonic()
        own = self.answers([p.ids for _, p, _ in whose], seeds, [p.limit for _, p, _ in whose])
        # Time limits, and so verdicts, may differ between processes, which have to learn from the same rollouts.
        answers = of_first_rank(lambda: own)
        decoded = time.monotonic()
        rollouts = [self._rollout(prompt, answer) for (_, prompt, _), answer in zip(whose, answers, strict=True)]
        scored = of_first_rank(lambda: self.rewards(rollouts, step=self.first_step(iteration)))
        tally.judging += time.monotonic() - decoded
        tally.decoding += decoded - started
        for name, count in scored.clamped.items():
            tally.clamped[name] = tally.clamped.get(name, 0) + count
        found = [
            _Judged(prompt, place, k, attempt, answers[i], rollouts[i], scored.totals[i],
                    {name: scores[i] for name, scores in scored.components.items()})
            for i, (place, prompt, k) in enumerate(whose)
        ]  # fmt: skip
        tally.judged += found
        return [found[start : start + self.size] for start in range(0, len(found), self.size)]

    def _rollout(self, prompt: Prompt, answer: Decoded) -> Rollout:
        whole = completion(answer.ids, self.tokenizer, self.stop_ids)
        return Rollout(prompt.text, whole.text, whole.token_ids, prompt.example, whole.truncated)

    def _counts(self, judged: _Judged) -> bool:
        return judged.total.value is not None and not (self.mask_truncated and judged.rollout.truncated)

    def _teaches(self, group: Sequence[_Judged]) -> bool:
        """Whether some completions of a prompt are better than others, and not all of those are masked."""
        kept = [judged for judged in group if judged.total.value is not None]
        values = torch.tensor([judged.total.value for judged in kept], dtype=torch.float64)
        advantages = group_advantages(values, torch.zeros(len(kept), dtype=torch.long)).values.tolist()
        return any(value and self._counts(judged) for judged, value in zip(kept, advantages, strict=True))

    def _credited(self, row: PolicyRow, judged: _Judged, advantage: float) -> PolicyRow:
        return replace(row, advantages=(advantage,) * row.targets, counts=self._counts(judged))

    def _measured(self, tally: _Tally, advantages: GroupAdvantages) -> dict[str, float]:
        every = tally.judged
        names = list(every[0].parts)
        parts = {name: tuple(judged.parts[name] for judged in every) for name in names}
        scored = Rewarded(totals=tuple(judged.total for judged in every), components=parts)
        return scored.metrics() | {
            "zero_variance_groups": float(advantages.zero_variance.double().mean()),
            "too_few_groups": float(advantages.too_few.double().mean()),
            "replaced_groups": tally.replaced / self.groups,
            "reward_s": tally.judging,
            **lengths([judged.answer for judged in every], tally.decoding, self.stop_ids),
        }

    def _records(
        self, iteration: int, tally: _Tally, chosen: Sequence[_Judged], advantages: Sequence[float]
    ) -> list[Record]:
        """Of everything that was sampled, in the order of sampling."""
        credited = {id(judged): advantage for judged, advantage in zip(chosen, advantages, strict=True)}
        step = self.first_step(iteration)
        return [
            Record(
                iteration=iteration + 1,
                step=step,
                group=judged.group,
                sample=judged.sample,
                attempt=judged.attempt,
                counts=id(judged) in credited and self._counts(judged),
                id=judged.prompt.id,
                prompt=judged.prompt.text,
                text=judged.rollout.text,
                tokens=len(judged.answer.ids),
                truncated=judged.rollout.truncated,
                status=judged.total.status,
                reason=judged.total.reason,
                total=judged.total.value,
                advantage=credited.get(id(judged)),
                rewards={name: score.value for name, score in judged.parts.items()},
                notes={name: score.reason for name, score in judged.parts.items()},
            )
            for judged in tally.judged
        ]


def _line(iteration: int, tally: _Tally, facts: Mapping[str, float]) -> str:
    clamped = "".join(f"; {count} values of {name} outside its range" for name, count in tally.clamped.items())
    mean = facts.get("reward/total/mean")
    return (
        f"rollouts {iteration + 1}: {len(tally.judged)} completions of {facts['answer_tokens']:.1f} tokens, "
        f"{facts['truncated_share']:.0%} truncated, {facts['generation_tokens_per_s']:.0f} tokens/s; "
        f"reward {'none' if mean is None else f'{mean:.3f}'}, judged in {facts['reward_s']:.1f} s; "
        f"{facts['zero_variance_groups']:.0%} of the groups all alike{clamped}"
    )

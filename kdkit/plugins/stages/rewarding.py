"""Rewards as scores: what answers would have earned, with everything that a metric's value has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from kdkit.api.data import Completion, Example, MetricResult, RewardScore, Rollout
from kdkit.plugins.stages.results import entry_of
from kdkit.plugins.stages.slots import reward_keys
from kdkit.train.rewards import RewardSet

if TYPE_CHECKING:
    from kdkit.api import Reward, Weighted

__all__ = ["answers_as_rollouts", "reward_entries"]

_UNIT: Final = "mean reward"


def answers_as_rollouts(
    prompts: Sequence[str], rows: Sequence[Example], answers: Sequence[Completion]
) -> list[Rollout]:
    """Answers as rewards see them.

    Args:
        prompts: Prompt text of every row.
        rows: The examples.
        answers: Row by row, as many to each.
    """
    samples = len(answers) // len(rows)
    return [
        Rollout(prompts[i // samples], answer.text, answer.token_ids, rows[i // samples], answer.truncated)
        for i, answer in enumerate(answers)
    ]


def reward_entries(
    components: Sequence[Weighted[Reward]], rewards: RewardSet, rollouts: Sequence[Rollout]
) -> dict[str, dict[str, Any]]:
    """Entries of ``scores.json``: one per reward, and their weighted sum where there are several.

    Answers that a reward cannot judge do not count; how many they are stands beside the value.

    Raises:
        StageError: Too many answers could not be judged because of the judge.
    """
    scored = rewards(rollouts)
    columns = [*scored.components.values(), scored.totals]
    ids = [rollout.example.id if rollout.example is not None else "" for rollout in rollouts]
    # Without a sum there is a key less.
    return {key: _entry(column, ids) for key, column in zip(reward_keys(components), columns, strict=False)}


def _entry(scores: Sequence[RewardScore], ids: Sequence[str]) -> dict[str, Any]:
    usable = [(name, score.value) for name, score in zip(ids, scores, strict=True) if score.value is not None]
    values = tuple(value for _, value in usable)
    result = MetricResult(
        value=math.fsum(values) / len(values) if values else math.nan,
        per_example=values,
        n=len(values),
        counts=Counter(f"answers that are {score.status}" for score in scores if score.value is None),
    )
    entry = entry_of(result, higher_is_better=True, unit=_UNIT) | {"ids": [name for name, _ in usable]}
    if values:
        return entry
    reasons = Counter(score.reason for score in scores if score.reason)
    return entry | {"reason": max(reasons, key=reasons.__getitem__, default="no answer was scored")}

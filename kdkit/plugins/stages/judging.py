"""Verdicts on answers, from a reward whose best score is 1."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kdkit.api.data import RewardScore
from kdkit.api.errors import StageError
from kdkit.plugins.stages.rewarding import answers_as_rollouts

if TYPE_CHECKING:
    from kdkit.api import Completion, Example, Reward

__all__ = ["PASSED", "verdicts"]

PASSED: Final = 1.0
"""The reward of an answer that passes all its tests."""


def verdicts(
    judge: Reward, name: str, prompts: Sequence[str], rows: Sequence[Example], answers: Sequence[Completion]
) -> tuple[list[bool | None], Counter[str]]:
    """Whether each answer passed (None when it could not be judged), and how many could not, by reason.

    Args:
        judge: The reward.
        name: What the recipe calls it, for errors.
        prompts: Prompt text of every row.
        rows: The examples.
        answers: Row by row, as many to each.

    Raises:
        StageError: The judge gave another number of scores than answers.
    """
    rollouts = answers_as_rollouts(prompts, rows, answers)
    scores = judge(rollouts)
    if len(scores) != len(rollouts):
        raise StageError(f"{len(scores)} scores for {len(rollouts)} answers", where=f"judge {name}")
    unjudged = Counter[str](_reason(score) for score in scores if _verdict(score) is None)
    return [_verdict(score) for score in scores], unjudged


def _verdict(score: RewardScore) -> bool | None:
    if score.status != "ok" or score.value is None or math.isnan(score.value):
        return None
    return bool(score.value >= PASSED)


def _reason(score: RewardScore) -> str:
    return score.status if score.status != "ok" else "without a number"

"""Closeness to a reference answer, for tasks without tests."""

from __future__ import annotations

from collections.abc import Sequence

from kdkit.api.data import Prediction, RewardScore, Rollout
from kdkit.api.protocols import Metric
from kdkit.plugins.rewards.scores import scored
from kdkit.plugins.rewards.tags import answer_part, opened_by_prompt

__all__ = ["Rouge"]


class Rouge:
    """A metric's value of the answer after the thought, over 100; see ``RougeParams``."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[RewardScore]:
        """See :class:`kdkit.api.protocols.Reward`."""
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> RewardScore:
        targets = rollout.example.targets if rollout.example is not None else ()
        if not targets:
            return RewardScore.unscorable("no reference answer")
        answer = answer_part(rollout.text, opened=opened_by_prompt(rollout)).strip()
        if not answer:
            return scored(0.0, 0.0, 1.0, "no answer")
        references = tuple(answer_part(target, opened=False).strip() or target for target in targets)
        # One at a time: the mean of a metric need not be that of its parts.
        result = self._metric.score([Prediction(rollout.prompt, answer, references, id="0")])
        return scored(result.value / 100.0, 0.0, 1.0)

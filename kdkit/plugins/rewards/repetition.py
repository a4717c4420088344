"""A penalty for saying the same again and again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from kdkit.api.data import RewardScore, Rollout
from kdkit.plugins.rewards.scores import scored
from kdkit.plugins.rewards.words import words

__all__ = ["Repetition"]


class Repetition:
    """Minus the share of n-grams of words that are no first occurrence; see ``RepetitionParams``."""

    def __init__(self, *, n: int) -> None:
        self._n = n

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[RewardScore]:
        """See :class:`kdkit.api.protocols.Reward`."""
        return [self._score(rollout.text) for rollout in rollouts]

    def _score(self, text: str) -> RewardScore:
        said = words(text)
        if not said:
            return scored(-1.0, -1.0, 0.0, "no words")
        total = len(said) - self._n + 1
        if total < 1:
            return scored(0.0, -1.0, 0.0, f"fewer than {self._n} words")
        distinct = len(set(zip(*(islice(said, start, None) for start in range(self._n)), strict=False)))
        return scored(distinct / total - 1.0, -1.0, 0.0, f"{distinct} of {total} {self._n}-grams are distinct")

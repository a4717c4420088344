"""Rewards for the length of a completion, in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdkit.api.data import RewardScore, Rollout
from kdkit.api.errors import ConformanceError
from kdkit.plugins.rewards.correctness import PASSED
from kdkit.plugins.rewards.scores import scored

if TYPE_CHECKING:
    from kdkit.api import Reward
    from kdkit.plugins.rewards.params import LengthParams

__all__ = ["Length", "cosine", "overlong", "window"]


def cosine(length: int, longest: int, short: float, long: float) -> float:
    """From ``short`` at no tokens to ``long`` at ``longest`` and beyond, along half a cosine (Yeo et al. 2025)."""
    progress = min(length / longest, 1.0)
    return long + 0.5 * (short - long) * (1.0 + math.cos(math.pi * progress))


def window(length: int, shortest: int, longest: int, margin: int) -> float:
    """1 from ``shortest`` to ``longest``, falling to 0 within ``margin`` tokens on both sides; 0 for no tokens."""
    outside = max(shortest - length, length - longest, 0)
    if length == 0 or outside == 0:
        return float(length > 0)
    return max(0.0, 1.0 - outside / margin) if margin else 0.0


def overlong(length: int, longest: int, margin: int) -> float:
    """0 up to ``longest - margin``, then down to -1 at ``longest`` and beyond (DAPO, equation 13)."""
    over = length - (longest - margin)
    if over <= 0:
        return 0.0
    return -min(1.0, over / margin) if margin else -1.0


class Length:
    """One of three shapes; see ``LengthParams``.

    Args:
        params: The parameters.
        judge: The reward that says which completions are right, where the shape depends on it.
    """

    def __init__(self, params: LengthParams, judge: Reward | None) -> None:
        self._params = params
        self._judge = judge

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[RewardScore]:
        """See :class:`kdkit.api.protocols.Reward`.

        Raises:
            ConformanceError: The nested reward gave another number of scores than it had rollouts.
        """
        if self._judge is None:
            return [self._score(rollout, right=True) for rollout in rollouts]
        judged = self._judge(rollouts)
        if len(judged) != len(rollouts):
            raise ConformanceError(f"{len(judged)} scores for {len(rollouts)} rollouts", where="length: correctness")
        return [
            self._score(rollout, right=score.value is not None and score.value >= PASSED)
            if score.status == "ok"
            else RewardScore(score.status, None, score.reason or "not judged")
            for rollout, score in zip(rollouts, judged, strict=True)
        ]

    def close(self) -> None:
        """Close the nested reward."""
        close = getattr(self._judge, "close", None)
        if close is not None:
            close()

    def _score(self, rollout: Rollout, *, right: bool) -> RewardScore:
        params, tokens = self._params, len(rollout.token_ids)
        if params.shape == "overlong":
            value = overlong(tokens, params.max_tokens, params.margin)
        elif params.shape == "target":
            value = window(tokens, params.min_tokens, params.max_tokens, params.margin) if right else 0.0
        elif right:
            value = cosine(tokens, params.max_tokens, params.correct_short, params.correct_long)
        else:
            value = cosine(tokens, params.max_tokens, params.wrong_short, params.wrong_long)
        judged = "" if self._judge is None else ", right" if right else ", wrong"
        return scored(value, -1.0, 1.0, f"{tokens} tokens{judged}")

"""Scores that stay in range."""

from __future__ import annotations

import math

from kdkit.api.data import RewardScore

__all__ = ["scored"]


def scored(value: float, low: float, high: float, note: str | None = None) -> RewardScore:
    """``value`` clamped to ``low`` to ``high`` with a note for the person who reads the rollouts.

    Raises:
        ValueError: The value is no number, which no text can cause.
    """
    if math.isnan(value):
        raise ValueError("a reward is not a number")
    # Adding zero turns -0.0 into 0.0.
    return RewardScore("ok", min(max(float(value), low), high) + 0.0, note)

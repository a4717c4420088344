"""Checks of a rollout; see the class."""

from __future__ import annotations

__all__ = ["RolloutConformance"]


class RolloutConformance:
    """What every rollout must fulfil."""

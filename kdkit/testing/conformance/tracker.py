"""Checks of a tracker; see the class."""

from __future__ import annotations

__all__ = ["TrackerConformance"]


class TrackerConformance:
    """What every tracker must fulfil."""

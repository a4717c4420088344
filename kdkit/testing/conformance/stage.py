"""Checks of a stage; see the class."""

from __future__ import annotations

__all__ = ["StageConformance"]


class StageConformance:
    """What every stage must fulfil."""

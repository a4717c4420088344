"""Checks of a teacher; see the class."""

from __future__ import annotations

__all__ = ["TeacherConformance"]


class TeacherConformance:
    """What every teacher must fulfil."""

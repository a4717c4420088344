"""From per-example scores to a report: statistics, ``report.json``, ``report.md`` and the terminal view.

Only :mod:`~kdkit.report.statistics` and what builds a report need numpy; showing a finished one does not.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ALPHA"]

ALPHA: Final = 0.05
"""Largest p at which two models are said to differ."""

"""Scores per category of the test set."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

from kdkit.report.compare import Notes
from kdkit.report.statistics import Bootstrap, Sample, score_interval

__all__ = ["by_category", "category_entries"]

_MOST: Final = 40
"""Categories of one dataset that a report shows, the largest ones."""


def by_category(categories: Mapping[str, str], dataset: str, notes: Notes) -> dict[str, frozenset[str]]:
    """Category to the ids of its examples, in the order of the dataset; empty when no example has a category."""
    ids: dict[str, list[str]] = defaultdict(list)
    for name, category in categories.items():
        if category:
            ids[category].append(name)
    largest = set(sorted(ids, key=lambda category: -len(ids[category]))[:_MOST])
    if len(ids) > _MOST:
        notes.add(f"only the {_MOST} largest categories have scores of their own", f"{dataset} ({len(ids):,})")
    return {category: frozenset(ids[category]) for category in ids if category in largest}


def category_entries(
    sample: Sample, groups: Mapping[str, frozenset[str]], *, seed: int, unit: str = ""
) -> dict[str, Any]:
    """Category to ``value``, ``n`` and ``ci95`` of its examples; absent where no example was scored."""
    known = frozenset(sample.ids)
    parts = {category: sample.only(ids & known) for category, ids in groups.items()}
    return {
        category: {"value": part.value, "n": part.n, "ci95": _interval(part, seed, unit)}
        for category, part in parts.items()
        if math.isfinite(part.value)
    }


def _interval(part: Sample, seed: int, unit: str) -> list[float] | None:
    ci95 = score_interval(part, Bootstrap(seed), unit=unit)
    return list(ci95) if ci95 else None

"""What the evaluate stage reads from its metric slots. Light: also used while a recipe is validated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kdkit.api import Component, Metric

__all__ = ["DECODED", "FORCED", "all_needs", "metric_key", "metric_needs", "needs_reference"]

DECODED: Final = frozenset({"completion", "verdict", "exposure", "student-kl"})
"""Needs that ask for generated answers."""
FORCED: Final = frozenset({"teacher-kl", "exposure", "student-kl"})
"""Needs that ask for a teacher."""


def metric_key(metric: Component[Metric]) -> str:
    """The key of a metric in scores and reports: it tells ``pass-at-1`` from ``pass-at-10``."""
    spec: Any = metric.found.spec
    return str(spec.key(metric.params)) if spec.key is not None else str(spec.name)


def metric_needs(metric: Component[Metric]) -> frozenset[str]:
    """What the metric's spec says it needs."""
    spec: Any = metric.found.spec
    return frozenset(spec.needs)


def needs_reference(metric: Component[Metric]) -> bool:
    """Whether the metric says nothing about a row that has no reference."""
    return bool(metric_needs(metric) & {"reference", "nll", "teacher-kl"})


def all_needs(metrics: Iterable[Component[Metric]]) -> frozenset[str]:
    """What any of the metrics needs."""
    return frozenset().union(*(metric_needs(metric) for metric in metrics))

"""What the evaluate stage reads from its metric slots. Light: also used while a recipe is validated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from kdkit.train.rewards import reward_names

if TYPE_CHECKING:
    from kdkit.api import Component, Metric, Reward, Weighted

__all__ = ["DECODED", "FORCED", "all_needs", "metric_key", "metric_needs", "needs_reference", "reward_keys"]

DECODED: Final = frozenset({"completion", "verdict", "exposure", "student-kl"})
"""Needs that ask for generated answers."""
FORCED: Final = frozenset({"teacher-kl", "exposure", "student-kl"})
"""Needs that ask for a teacher."""


def metric_key(metric: Component[Metric]) -> str:
    """The key of a metric in scores and reports: it tells ``pass-at-1`` from ``pass-at-10``."""
    spec: Any = metric.found.spec
    return str(spec.key(metric.params)) if spec.key is not None else str(spec.name)


def reward_keys(rewards: Sequence[Weighted[Reward]]) -> list[str]:
    """Keys of rewards in scores and reports, with that of their sum as the last one where there are several."""
    names = [f"reward-{name}" for name in reward_names(rewards)]
    return [*names, "reward"] if len(names) > 1 else names


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

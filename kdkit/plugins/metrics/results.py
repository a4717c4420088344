"""What all metrics do the same way: choose what can be scored, and sum up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kdkit.api.data import MetricResult, Prediction
from kdkit.api.errors import DataError

__all__ = ["best_of_references", "named"]


def named(predictions: Sequence[Prediction]) -> list[tuple[str, Prediction]]:
    """Every prediction with its id; one without an id is called after its place, from 0."""
    return [(prediction.id or str(place), prediction) for place, prediction in enumerate(predictions)]


def best_of_references(
    predictions: Sequence[Prediction], compare: Callable[[str, str], float], name: str
) -> MetricResult:
    """The mean over predictions of the best score against any reference, times 100.

    Args:
        predictions: Those without references are left out, and ``n`` says so.
        compare: ``(reference, text)`` to a score in [0, 1].
        name: The metric's name, for the error.

    Raises:
        DataError: No prediction has references.
    """
    scored = [(key, item) for key, item in named(predictions) if item.references]
    if not scored:
        raise DataError(
            f"{name}: none of {len(predictions)} predictions has a reference to compare with",
            hint="evaluate on rows with answers, or choose another metric",
        )
    values = tuple(100.0 * max(compare(reference, item.text) for reference in item.references) for _, item in scored)
    return MetricResult(
        value=math.fsum(values) / len(values),
        per_example=values,
        n=len(values),
        ids=tuple(key for key, _ in scored),
    )

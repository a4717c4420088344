"""What all metrics do the same way: choose what can be scored, count what cannot, and sum up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from kdkit.api.data import MetricResult, Prediction
from kdkit.api.errors import DataError

__all__ = ["best_of_references", "by_example", "named", "occurred", "plain_mean"]


def named(predictions: Sequence[Prediction]) -> list[tuple[str, Prediction]]:
    """Every prediction with its id; one without an id is called after its place, from 0."""
    return [(prediction.id or str(place), prediction) for place, prediction in enumerate(predictions)]


def by_example(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Id to all answers to that example, in the order in which the ids first occur."""
    answers: dict[str, list[Prediction]] = {}
    for key, prediction in named(predictions):
        answers.setdefault(key, []).append(prediction)
    return answers


def occurred(counts: Mapping[str, int]) -> dict[str, int]:
    """``counts`` without zeros, as :attr:`kdkit.api.MetricResult.counts` wants them."""
    return {what: number for what, number in counts.items() if number}


def plain_mean(scored: Sequence[tuple[str, float]], counts: Mapping[str, int]) -> MetricResult:
    """The mean of the values in ``scored`` (ids and values, at least one), each counting the same."""
    values = tuple(value for _, value in scored)
    return MetricResult(
        value=math.fsum(values) / len(values),
        per_example=values,
        n=len(values),
        ids=tuple(key for key, _ in scored),
        counts=occurred(counts),
    )


def best_of_references(
    predictions: Sequence[Prediction], compare: Callable[[str, str], float], name: str
) -> MetricResult:
    """The mean over predictions of the best score against any reference, times 100.

    Args:
        predictions: Those without references are left out, and ``counts`` says how many.
        compare: ``(reference, text)`` to a score in [0, 1].
        name: The metric's name, for the error.

    Raises:
        DataError: No prediction has references.
    """
    scored = [
        (key, 100.0 * max(compare(reference, item.text) for reference in item.references))
        for key, item in named(predictions)
        if item.references
    ]
    if not scored:
        raise DataError(
            f"{name}: none of {len(predictions)} predictions has a reference to compare with",
            hint="evaluate on rows with answers, or choose another metric",
        )
    return plain_mean(scored, {"predictions without references": len(predictions) - len(scored)})

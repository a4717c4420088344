"""Intervals of metrics that have no values per example: the metric is computed again on resamples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from kdkit.report.statistics import Interval, interval

__all__ = ["corpus_interval"]


def corpus_interval(
    score: Callable[[list[int]], float], ids: Sequence[str], *, resamples: int, seed: int = 0
) -> Interval | None:
    """95 % percentile bootstrap over examples of a metric of all answers together.

    Args:
        score: Indices of answers, some of them several times, to the metric's value on these.
        ids: The example of every answer; all answers to an example are drawn together.
        resamples: How often the metric is computed; 0 gives no interval.
        seed: Of the draws.

    Returns:
        None for a single example, where a resample has no value, and where all have the same.
    """
    places: dict[str, list[int]] = {}
    for index, name in enumerate(ids):
        places.setdefault(name, []).append(index)
    if resamples == 0 or len(places) < 2:
        return None
    examples = list(places.values())
    rng = np.random.default_rng([seed, len(examples)])
    values = np.empty(resamples)
    for row in range(resamples):
        drawn = rng.integers(0, len(examples), size=len(examples))
        values[row] = score([index for place in drawn for index in examples[place]])
        if not math.isfinite(values[row]):
            return None
    return interval(values)

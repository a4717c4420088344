"""Greedy matching of tokens (Zhang et al. 2020, equations 1 to 3), without weights for rare ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from kdkit.api import DataError, MetricResult, Prediction
from kdkit_bertscore_lite.vectors import Embedded, Vectors

__all__ = ["BertscoreLite", "Match", "matched"]

_ROWS: Final = 512
"""Tokens compared at once: two texts of many thousands must not need a table of all pairs."""
_REMEMBERED: Final = 4096


@dataclass(frozen=True, slots=True)
class Match:
    """How well two texts match, each in [0, 1]."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """The harmonic mean; 0 when both are."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def matched(answer: NDArray[np.float64], reference: NDArray[np.float64]) -> Match:
    """The best partner of every token.

    Args:
        answer: [n, d] vectors of length 1.
        reference: [m, d] vectors of length 1.

    Returns:
        Precision, the mean over the answer's tokens of the largest cosine with any of the reference's, and recall, the
        same the other way round. Cosines below 0 count as 0. Both are 0 when a text has no tokens.
    """
    if not len(answer) or not len(reference):
        return Match(0.0, 0.0)
    of_answer = np.zeros(len(answer))
    of_reference = np.zeros(len(reference))
    for start in range(0, len(answer), _ROWS):
        part = slice(start, start + _ROWS)
        cosines = np.clip(answer[part] @ reference.T, 0.0, 1.0)
        of_answer[part] = cosines.max(1)
        np.maximum(of_reference, cosines.max(0), out=of_reference)
    return Match(float(math.fsum(of_answer)) / len(answer), float(math.fsum(of_reference)) / len(reference))


class BertscoreLite:
    """See :class:`kdkit_bertscore_lite.plugin.BertscoreLiteParams`."""

    def __init__(self, vectors: Vectors, measure: Literal["f1", "precision", "recall"]) -> None:
        self._longest, self._measure = vectors.longest, measure
        # The references of a dataset come again with every model.
        self._embedded = lru_cache(maxsize=_REMEMBERED)(vectors)

    def score(self, predictions: Sequence[Prediction], /) -> MetricResult:
        """See :class:`kdkit.api.Metric`.

        Raises:
            DataError: No prediction has a reference.
        """
        scored = [(item.id or str(place), item) for place, item in enumerate(predictions) if item.references]
        if not scored:
            raise DataError(
                f"bertscore-lite: none of {len(predictions)} predictions has a reference to compare with",
                hint="evaluate on rows with answers, or choose another metric",
            )
        values = tuple(self._best(item) for _, item in scored)
        counts = {
            "predictions without references": len(predictions) - len(scored),
            f"predictions with a text cut at {self._longest} tokens": sum(self._is_cut(item) for _, item in scored),
        }
        return MetricResult(
            value=math.fsum(values) / len(values),
            per_example=values,
            n=len(values),
            ids=tuple(key for key, _ in scored),
            counts={what: number for what, number in counts.items() if number},
        )

    def _best(self, item: Prediction) -> float:
        answer = self._of(item.text).vectors
        matches = (matched(answer, self._of(reference).vectors) for reference in item.references)
        return 100.0 * max(float(getattr(match, self._measure)) for match in matches)

    def _is_cut(self, item: Prediction) -> bool:
        return any(self._of(text).cut for text in (item.text, *item.references))

    def _of(self, text: str) -> Embedded:
        return self._embedded(text)

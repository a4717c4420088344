"""chrF (Popović 2015) through the sacrebleu package."""

from __future__ import annotations

from collections.abc import Sequence

from kdkit.api.data import MetricResult, Prediction
from kdkit.plugins.metrics.results import best_of_references

__all__ = ["ChrF"]


class ChrF:
    """chrF2 of each answer (F-score with recall twice as important), the best over the references, averaged."""

    def __init__(self) -> None:
        from sacrebleu.metrics.chrf import CHRF

        self._scorer = CHRF()

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """See :class:`kdkit.api.Metric`. Raises ``DataError`` when no prediction has references."""
        return best_of_references(predictions, self._compare, "chrf")

    def _compare(self, reference: str, text: str) -> float:
        return float(self._scorer.sentence_score(text, [reference]).score) / 100.0

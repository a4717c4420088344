"""What an answer is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdkit.api import DataError, MetricResult, Prediction


class AcmeMetric:
    """100 for an answer that equals one of its references, else 0; the mean over answers.

    Args:
        ignore_case: Upper and lower case are the same.
    """

    def __init__(self, *, ignore_case: bool) -> None:
        self._ignore_case = ignore_case

    def score(self, predictions: Sequence[Prediction], /) -> MetricResult:
        """The mean, with the value of every answer that has a reference.

        Raises:
            DataError: None has one.
        """
        scored = [(p.id or str(place), p) for place, p in enumerate(predictions) if p.references]
        if not scored:
            raise DataError(f"none of {len(predictions)} predictions has a reference")
        values = tuple(self._value(prediction) for _, prediction in scored)
        left_out = len(predictions) - len(scored)
        return MetricResult(
            value=math.fsum(values) / len(values),
            per_example=values,
            n=len(values),
            ids=tuple(key for key, _ in scored),
            counts={"predictions without references": left_out} if left_out else {},
        )

    def _value(self, prediction: Prediction) -> float:
        """What one answer is worth; no text of a model may make it raise."""
        answer = self._plain(prediction.text)
        return 100.0 * any(answer == self._plain(text) for text in prediction.references)

    def _plain(self, text: str) -> str:
        """Without differences that do not matter."""
        text = " ".join(text.split())
        return text.casefold() if self._ignore_case else text

"""Means over all tokens, of references or of the model's own answers, from what a teacher-forced pass measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from kdkit.api.data import MetricResult, Prediction
from kdkit.api.errors import DataError
from kdkit.plugins.metrics.results import named, occurred

__all__ = ["PerTokenMean"]


class PerTokenMean:
    """``link(sum of a measure / sum of tokens)``: each token counts the same, so long answers count for more."""

    def __init__(
        self, measure: Literal["nll", "teacher_kl", "own_reverse_kl"], *, link: Literal["identity", "exp"]
    ) -> None:
        self._measure = measure
        self._link: Literal["identity", "exp"] = link

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """Predictions without the measure, or without a token, are left out and counted.

        Raises:
            DataError: Nothing is left, or a measure is not finite.
        """
        scored = [(key, *pair) for key, item in named(predictions) if (pair := self._sums(key, item)) is not None]
        if not scored:
            raise DataError(
                f"none of {len(predictions)} predictions has the measure {self._measure!r} of a token",
                hint="evaluate on rows with answers",
            )
        weights = tuple(tokens for _, _, tokens in scored)
        mean = math.fsum(total for _, total, _ in scored) / math.fsum(weights)
        return MetricResult(
            value=self._linked(mean),
            per_example=tuple(total / tokens for _, total, tokens in scored),
            n=len(scored),
            weights=weights,
            link=self._link,
            ids=tuple(key for key, _, _ in scored),
            counts=occurred({"predictions without tokens to measure": len(predictions) - len(scored)}),
        )

    def _sums(self, key: str, prediction: Prediction) -> tuple[float, float] | None:
        total, tokens = (
            _of_trace(prediction.traces[self._measure])
            if self._measure in prediction.traces
            else (
                prediction.measures.get(self._measure),
                prediction.measures.get("tokens"),
            )
        )
        if total is None or tokens is None or tokens == 0:
            return None
        # One NaN would otherwise turn the whole table into NaN without saying which row it came from.
        if not math.isfinite(total) or not math.isfinite(tokens) or tokens < 0:
            raise DataError(f"{self._measure} is {total} over {tokens} tokens", where=f"example {key}")
        return float(total), float(tokens)

    def _linked(self, mean: float) -> float:
        if self._link == "identity":
            return mean
        try:
            return math.exp(mean)
        except OverflowError as error:
            raise DataError(f"perplexity is too large for a number: exp({mean:.1f})") from error


def _of_trace(trace: Sequence[float]) -> tuple[float, float]:
    # fsum raises on a NaN beside an infinity; the sum that Python makes shows it.
    return (math.fsum(trace) if all(map(math.isfinite, trace)) else sum(trace)), len(trace)

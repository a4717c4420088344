"""What answers look like, whatever they say: repetition and length."""

from __future__ import annotations

from collections.abc import Sequence

from kdkit.api.data import MetricResult, Prediction
from kdkit.api.errors import DataError
from kdkit.plugins.metrics.results import named, plain_mean
from kdkit.plugins.metrics.words import unicode_words

__all__ = ["DistinctN", "Length"]


class DistinctN:
    """Distinct n-grams of words per hundred n-grams of an answer, after Li et al. (2016), who count over all answers.

    Each answer counts by itself, so that the value does not fall with the number of samples.
    """

    def __init__(self, *, n: int) -> None:
        self._n = n

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """The mean over answers; those of fewer than n words are left out and counted.

        Raises:
            DataError: No answer is left.
        """
        found = [(key, self._ngrams(item.text)) for key, item in named(predictions)]
        scored = [(key, 100.0 * len(set(ngrams)) / len(ngrams)) for key, ngrams in found if ngrams]
        if not scored:
            raise DataError(f"distinct-{self._n}: none of {len(predictions)} answers has {self._n} words")
        return plain_mean(scored, {f"answers of fewer than {self._n} words": len(predictions) - len(scored)})

    def _ngrams(self, text: str) -> list[tuple[str, ...]]:
        words = unicode_words(text)
        return [tuple(words[at : at + self._n]) for at in range(len(words) - self._n + 1)]


class Length:
    """Characters per answer, without white space at its ends."""

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """See :class:`kdkit.api.Metric`. Raises ``DataError`` when there are no predictions."""
        if not predictions:
            raise DataError("length: there are no predictions to score")
        return plain_mean([(key, float(len(item.text.strip()))) for key, item in named(predictions)], {})

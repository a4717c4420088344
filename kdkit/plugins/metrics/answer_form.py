"""What answers look like, whatever they say: repetition and length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kdkit.api.data import MetricResult, Prediction
from kdkit.api.errors import DataError
from kdkit.plugins.metrics.results import by_example, named, plain_mean
from kdkit.plugins.metrics.words import unicode_words

__all__ = ["DistinctN", "Length"]


class DistinctN:
    """Distinct n-grams of words per hundred n-grams (Li et al. 2016), over all answers to an example together."""

    def __init__(self, *, n: int) -> None:
        self._n = n

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """The mean over examples; those whose answers are all shorter than n words are left out and counted.

        Raises:
            DataError: No example is left.
        """
        examples = by_example(predictions)
        found = [(key, self._ngrams(item.text for item in answers)) for key, answers in examples.items()]
        scored = [(key, 100.0 * len(set(ngrams)) / len(ngrams)) for key, ngrams in found if ngrams]
        if not scored:
            raise DataError(f"distinct-{self._n}: no answer to any of {len(examples)} examples has {self._n} words")
        return plain_mean(scored, {f"examples without an answer of {self._n} words": len(examples) - len(scored)})

    def _ngrams(self, texts: Iterable[str]) -> list[tuple[str, ...]]:
        answers = [unicode_words(text) for text in texts]
        return [tuple(words[at : at + self._n]) for words in answers for at in range(len(words) - self._n + 1)]


class Length:
    """Characters per answer, without white space at its ends."""

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """See :class:`kdkit.api.Metric`. Raises ``DataError`` when there are no predictions."""
        if not predictions:
            raise DataError("length: there are no predictions to score")
        return plain_mean([(key, float(len(item.text.strip()))) for key, item in named(predictions)], {})

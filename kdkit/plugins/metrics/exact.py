"""Exact match, with the normalisation of SQuAD and Super-NaturalInstructions (articles are kept)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Final

from kdkit.api.data import MetricResult, Prediction
from kdkit.plugins.metrics.results import best_of_references

__all__ = ["ExactMatch", "normalized"]

_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


class ExactMatch:
    """100 for an answer that equals one of its references, else 0; averaged over predictions."""

    def __init__(self, *, normalize: bool) -> None:
        self._form = normalized if normalize else str

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """See :class:`kdkit.api.Metric`. Raises ``DataError`` when no prediction has references."""
        return best_of_references(predictions, self._equal, "exact-match")

    def _equal(self, reference: str, text: str) -> float:
        return float(self._form(reference) == self._form(text))


def normalized(text: str) -> str:
    """``text`` in lower case, without ASCII punctuation, with single spaces."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())

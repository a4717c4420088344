"""ROUGE-L (Lin 2004) through the rouge-score package."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kdkit.api.data import MetricResult, Prediction
from kdkit.plugins.metrics.results import best_of_references

if TYPE_CHECKING:
    from nltk.stem.porter import PorterStemmer

__all__ = ["RougeL", "UnicodeWords"]

# Marks belong to the letter before them: Indic vowel signs and decomposed accents are no word boundary.
_SEPARATORS: Final = ("Z", "P", "S", "C")
_STEM_FROM: Final = 4


class RougeL:
    """ROUGE-L F-measure times 100, the best over the references, averaged over predictions.

    The package splits at everything but ``a-z0-9``, so that "año" becomes "a" and "o" and a Chinese text has no words
    at all; published tables are made that way. ``unicode=True`` takes words of any script.
    """

    def __init__(self, *, use_stemmer: bool, unicode: bool = False) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        words = UnicodeWords(use_stemmer=use_stemmer) if unicode else None
        self._scorer = RougeScorer(["rougeL"], use_stemmer=use_stemmer, tokenizer=words)

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """See :class:`kdkit.api.Metric`. Raises ``DataError`` when no prediction has references."""
        return best_of_references(predictions, self._f_measure, "rouge-l")

    def _f_measure(self, reference: str, text: str) -> float:
        return float(self._scorer.score(reference, text)["rougeL"].fmeasure)


class UnicodeWords:
    """A tokenizer for rouge-score: runs of letters, digits and marks; every CJK character is a word."""

    _CJK: Final = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")

    def __init__(self, *, use_stemmer: bool) -> None:
        self._stemmer: PorterStemmer | None = None
        if use_stemmer:
            from nltk.stem.porter import PorterStemmer

            self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        """The words of ``text``, case-folded and in composed form."""
        plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
        spaced = "".join(" " if unicodedata.category(char).startswith(_SEPARATORS) else char for char in plain)
        words = self._CJK.sub(r" \1 ", spaced).split()
        stemmer = self._stemmer
        if stemmer is None:
            return words
        return [stemmer.stem(word) if len(word) >= _STEM_FROM else word for word in words]

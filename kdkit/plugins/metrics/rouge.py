"""ROUGE-L (Lin 2004): the longest common subsequence of tokens, three ways to make tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal

from kdkit.api.data import MetricResult, Prediction
from kdkit.plugins.metrics.lcs import lcs_length
from kdkit.plugins.metrics.results import best_of_references
from kdkit.plugins.metrics.words import Stemmer, code_tokens, unicode_words

__all__ = ["RougeL"]

# rouge-score stems words of more than three letters.
_STEM_FROM: Final = 4


class RougeL:
    """ROUGE-L F-measure times 100, the best over the references, averaged over predictions.

    ``paper`` uses the tokenizer and the formula of the rouge-score package, and so gives its numbers; the subsequence
    is found in another way, because the package's table takes seconds for a pair of long answers.
    """

    def __init__(self, *, tokenizer: Literal["paper", "unicode", "code"], use_stemmer: bool) -> None:
        from rouge_score.scoring import fmeasure

        self._fmeasure = fmeasure
        self._tokens = _tokenizer(tokenizer, Stemmer() if use_stemmer else None)

    def score(self, predictions: Sequence[Prediction]) -> MetricResult:
        """See :class:`kdkit.api.Metric`. Raises ``DataError`` when no prediction has references."""
        return best_of_references(predictions, self._compare, "rouge-l")

    def _compare(self, reference: str, text: str) -> float:
        wanted, given = self._tokens(reference), self._tokens(text)
        if not wanted or not given:
            return 0.0
        common = lcs_length(wanted, given)
        return float(self._fmeasure(common / len(given), common / len(wanted)))


def _tokenizer(name: str, stemmer: Stemmer | None) -> Callable[[str], list[str]]:
    if name == "code":
        return code_tokens
    if name == "paper":
        from rouge_score.tokenize import tokenize

        return partial(tokenize, stemmer=stemmer)
    if stemmer is None:
        return unicode_words
    return partial(_stemmed_words, stemmer=stemmer)


def _stemmed_words(text: str, *, stemmer: Stemmer) -> list[str]:
    return [stemmer.stem(word) if len(word) >= _STEM_FROM else word for word in unicode_words(text)]

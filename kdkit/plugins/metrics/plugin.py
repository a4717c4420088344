"""The built-in metrics. Light: the implementations are imported when one is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdkit.api.hookspecs import hookimpl
from kdkit.api.params import Params
from kdkit.api.protocols import Metric
from kdkit.api.specs import MetricSpec

__all__ = ["ExactMatchParams", "NoParams", "RougeLParams", "RougeLUnicodeParams", "kdkit_metrics"]


class RougeLParams(Params):
    """ROUGE-L as the rouge-score package computes it."""

    use_stemmer: bool = True
    """Reduce English words of more than three letters to their stem before comparing."""


class RougeLUnicodeParams(Params):
    """ROUGE-L with words of any script."""

    use_stemmer: bool = False
    """Reduce words of more than three letters to their stem; the stemmer knows English only."""


class ExactMatchParams(Params):
    """Equality of texts."""

    normalize: bool = True
    """Ignore case, ASCII punctuation and runs of white space; false compares the texts as they are."""


class NoParams(Params):
    """No parameters."""


def _rouge_l(params: RougeLParams) -> Metric:
    from kdkit.plugins.metrics.rouge import RougeL

    return RougeL(use_stemmer=params.use_stemmer)


def _rouge_l_unicode(params: RougeLUnicodeParams) -> Metric:
    from kdkit.plugins.metrics.rouge import RougeL

    return RougeL(use_stemmer=params.use_stemmer, unicode=True)


def _exact_match(params: ExactMatchParams) -> Metric:
    from kdkit.plugins.metrics.exact import ExactMatch

    return ExactMatch(normalize=params.normalize)


def _perplexity(params: NoParams) -> Metric:
    from kdkit.plugins.metrics.per_token import PerTokenMean

    del params
    return PerTokenMean("nll", link="exp")


def _teacher_kl(params: NoParams) -> Metric:
    from kdkit.plugins.metrics.per_token import PerTokenMean

    del params
    return PerTokenMean("teacher_kl", link="identity")


@hookimpl
def kdkit_metrics() -> Iterator[MetricSpec[Any]]:
    """The built-in metrics."""
    yield MetricSpec(
        name="rouge-l",
        summary="ROUGE-L F-measure, best of the references, as published tables have it",
        params=RougeLParams,
        build=_rouge_l,
        higher_is_better=True,
        unit="0-100",
    )
    yield MetricSpec(
        name="rouge-l-unicode",
        summary="ROUGE-L that keeps accented letters and other scripts whole",
        params=RougeLUnicodeParams,
        build=_rouge_l_unicode,
        higher_is_better=True,
        unit="0-100",
    )
    yield MetricSpec(
        name="exact-match",
        summary="Share of answers equal to a reference",
        params=ExactMatchParams,
        build=_exact_match,
        higher_is_better=True,
        unit="0-100",
    )
    yield MetricSpec(
        name="perplexity",
        summary="Perplexity of the reference answers, over all their tokens",
        params=NoParams,
        build=_perplexity,
        higher_is_better=False,
        needs=frozenset({"nll"}),
        unit="per token",
    )
    yield MetricSpec(
        name="teacher-kl",
        summary="Mean KL divergence from the teacher on the reference answers",
        params=NoParams,
        build=_teacher_kl,
        higher_is_better=False,
        needs=frozenset({"teacher-kl"}),
        unit="nats/token",
    )

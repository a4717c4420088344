"""The built-in metrics. Light: the implementations are imported when one is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from kdkit.api.hookspecs import hookimpl
from kdkit.api.params import Params
from kdkit.api.protocols import Metric
from kdkit.api.specs import MetricSpec
from kdkit.plugins.metrics.hf_plugin import HF_EVALUATE

__all__ = [
    "CodeExactParams",
    "DistinctParams",
    "ExactMatchParams",
    "ExposureParams",
    "NoParams",
    "ParseRateParams",
    "PassAtKParams",
    "RougeLParams",
    "kdkit_metrics",
]


class RougeLParams(Params):
    """ROUGE-L F-measure, the best over the references. Reports call it `rouge-l`, `rouge-l-unicode`, `rouge-l-code`;
    with another stemming than usual `rouge-l-unstemmed`, `rouge-l-unicode-stemmed`.
    """

    tokenizer: Literal["paper", "unicode", "code"] = "paper"
    """What is compared. `paper`: words of `a-z` and `0-9`, exactly as the rouge-score package has them and as published
    tables are made; accented letters split words, other scripts and operators vanish. `unicode`: words of any script;
    every character is a word in scripts that put no spaces. `code`: names, numbers, strings and operators of any
    programming language; white space and indentation do not matter, upper and lower case do."""
    use_stemmer: bool | None = None
    """Reduce words of more than three letters to their English stem. Left out, `paper` does and the others do not;
    `code` cannot."""

    @model_validator(mode="after")
    def _code_has_no_stems(self) -> RougeLParams:
        if self.tokenizer == "code" and self.use_stemmer:
            raise ValueError("use_stemmer is for words: tokenizer code has none")
        return self


class ExactMatchParams(Params):
    """Equality of texts."""

    normalize: bool = True
    """Ignore case, ASCII punctuation and runs of white space; false compares the texts as they are, and reports call
    the metric `exact-match-raw`."""


class CodeExactParams(Params):
    """Equality of programs. Of an answer that is no Python as it stands, the last fenced block in Python counts, else
    the last block. A reference counts whole, unless it begins with a fence.
    """

    language: Literal["python", "any"] = "python"
    """`python`: the syntax trees are compared, so comments, white space, line breaks and the style of quotes do not
    matter; where the answer or the reference does not parse, their lines are, without blank lines and white space at
    the ends. `any`: the tokens of `rouge-l` with `tokenizer: code` are compared; comments count, and reports call the
    metric `code-exact-any`."""
    docstrings: bool = True
    """Docstrings must be equal too; false leaves them out of the comparison, and reports call the metric
    `code-exact-no-docstrings`. For `language: python`."""

    @model_validator(mode="after")
    def _docstrings_are_pythons(self) -> CodeExactParams:
        if self.language == "any" and not self.docstrings:
            raise ValueError("docstrings: false needs language: python")
        return self


class DistinctParams(Params):
    """Distinct n-grams of words per hundred n-grams of an answer; the mean over answers.

    Low numbers mean repetition. A high number is no merit by itself: random words have the highest, and short answers
    have higher ones than long ones. So neither end is better, and reports compare no models by it.
    """

    n: int = Field(2, ge=1)
    """Words in a row that make an n-gram; reports call the metric `distinct-2` after it. Answers that are shorter are
    left out and counted."""


class PassAtKParams(Params):
    """The chance that at least one of k answers passes its tests, estimated without bias from all judged answers.

    Needs an evaluation with a judge and at least k sampled answers per example. Answers that nobody could judge do not
    count, and examples with fewer than k judged answers are left out; both are counted.
    """

    k: int = Field(1, ge=1)
    """How many answers have a try; reports call the metric `pass-at-1` after it."""


class ExposureParams(Params):
    """Exposure bias as ExAccErr (Arora et al. 2022): `(R / eps - 1) * 100`.

    R is the KL divergence from the teacher added up over the first tokens of the model's own answers, eps the same on
    the teacher's answers, each a mean over examples. 0 means that the model is no further from the teacher in its own
    text than in the teacher's. Needs a teacher that generates text.

    R is the expectation over the model's own distribution, as in the paper, only where the evaluation samples from it
    as it is: `do_sample: true` with temperature 1, top_p 1 and top_k 0. With greedy decoding it is the divergence along
    the most likely answers.
    """

    tokens: int = Field(15, ge=1)
    """Tokens of an answer that are added up, from its first; reports call the metric `exposure-bias-15` after it. Where
    one of the two answers is shorter, both are added up to its end, and the pair is counted. At most
    `sampling.max_new_tokens` of the stage."""


class ParseRateParams(Params):
    """How many answers are code that parses in the Python that runs the evaluation. Nothing is run or compiled.

    Of an answer that does not parse as it stands, the last fenced block in Python counts, else the last block. Code
    without a statement, with more than 100 brackets open at once or of more than 200,000 characters does not count as
    parsing. One word of prose is a Python expression and does, as does what only a compiler notices (`return` outside
    a function).
    """


class NoParams(Params):
    """No parameters."""


def _rouge_l(params: RougeLParams) -> Metric:
    from kdkit.plugins.metrics.rouge import RougeL

    stem = params.tokenizer == "paper" if params.use_stemmer is None else params.use_stemmer
    return RougeL(tokenizer=params.tokenizer, use_stemmer=stem)


def _rouge_l_key(params: RougeLParams) -> str:
    usual = params.tokenizer == "paper"
    stem = usual if params.use_stemmer is None else params.use_stemmer
    key = "rouge-l" if usual else f"rouge-l-{params.tokenizer}"
    return key if stem == usual else f"{key}-{'stemmed' if stem else 'unstemmed'}"


def _exact_match(params: ExactMatchParams) -> Metric:
    from kdkit.plugins.metrics.exact import ExactMatch

    return ExactMatch(normalize=params.normalize)


def _code_exact(params: CodeExactParams) -> Metric:
    from kdkit.plugins.metrics.python_code import CodeExact

    return CodeExact(language=params.language, docstrings=params.docstrings)


def _code_exact_key(params: CodeExactParams) -> str:
    if params.language == "any":
        return "code-exact-any"
    return "code-exact" if params.docstrings else "code-exact-no-docstrings"


def _parse_rate(params: ParseRateParams) -> Metric:
    from kdkit.plugins.metrics.python_code import ParseRate

    del params
    return ParseRate()


def _chrf(params: NoParams) -> Metric:
    from kdkit.plugins.metrics.chrf import ChrF

    del params
    return ChrF()


def _distinct_n(params: DistinctParams) -> Metric:
    from kdkit.plugins.metrics.answer_form import DistinctN

    return DistinctN(n=params.n)


def _length(params: NoParams) -> Metric:
    from kdkit.plugins.metrics.answer_form import Length

    del params
    return Length()


def _pass_at_k(params: PassAtKParams) -> Metric:
    from kdkit.plugins.metrics.pass_at_k import PassAtK

    return PassAtK(k=params.k)


def _exposure_bias(params: ExposureParams) -> Metric:
    from kdkit.plugins.metrics.exposure import ExposureBias

    return ExposureBias(tokens=params.tokens)


def _perplexity(params: NoParams) -> Metric:
    from kdkit.plugins.metrics.per_token import PerTokenMean

    del params
    return PerTokenMean("nll", link="exp")


def _teacher_kl(params: NoParams) -> Metric:
    from kdkit.plugins.metrics.per_token import PerTokenMean

    del params
    return PerTokenMean("teacher_kl", link="identity")


def _student_kl(params: NoParams) -> Metric:
    from kdkit.plugins.metrics.per_token import PerTokenMean

    del params
    return PerTokenMean("own_reverse_kl", link="identity")


@hookimpl
def kdkit_metrics() -> Iterator[MetricSpec[Any]]:
    """The built-in metrics."""
    yield from _compared_with_references()
    yield from _of_answers_alone()
    yield from _of_models()


def _compared_with_references() -> Iterator[MetricSpec[Any]]:
    yield MetricSpec(
        name="rouge-l",
        summary="ROUGE-L F-measure: as published tables have it, for any script, or for code",
        params=RougeLParams,
        build=_rouge_l,
        key=_rouge_l_key,
        higher_is_better=True,
        unit="0-100",
        version=2,
    )
    yield MetricSpec(
        name="chrf",
        summary="chrF: overlap in character n-grams, best of the references",
        params=NoParams,
        build=_chrf,
        extras=("chrf",),
        higher_is_better=True,
        unit="0-100",
    )
    yield MetricSpec(
        name="exact-match",
        summary="Share of answers equal to a reference",
        params=ExactMatchParams,
        build=_exact_match,
        key=lambda params: "exact-match" if params.normalize else "exact-match-raw",
        higher_is_better=True,
        unit="0-100",
        version=2,
    )
    yield MetricSpec(
        name="code-exact",
        summary="Share of answers whose code is that of a reference, by syntax tree",
        params=CodeExactParams,
        build=_code_exact,
        key=_code_exact_key,
        higher_is_better=True,
        unit="0-100",
        version=2,
    )
    yield HF_EVALUATE


def _of_answers_alone() -> Iterator[MetricSpec[Any]]:
    yield MetricSpec(
        name="parse-rate",
        summary="Share of answers whose code parses as Python; nothing is run",
        params=ParseRateParams,
        build=_parse_rate,
        higher_is_better=True,
        unit="0-100",
        needs=frozenset({"completion"}),
        version=2,
    )
    yield MetricSpec(
        name="pass-at-k",
        summary="Chance that one of k answers passes its tests, unbiased",
        params=PassAtKParams,
        build=_pass_at_k,
        key=lambda params: f"pass-at-{params.k}",
        higher_is_better=True,
        needs=frozenset({"completion", "verdict"}),
        unit="0-100",
    )
    yield MetricSpec(
        name="distinct-n",
        summary="Distinct n-grams of words per hundred n-grams of an answer",
        params=DistinctParams,
        build=_distinct_n,
        key=lambda params: f"distinct-{params.n}",
        higher_is_better=None,
        unit="0-100",
        needs=frozenset({"completion"}),
        version=2,
    )
    yield MetricSpec(
        name="length",
        summary="Characters per answer, without white space at its ends",
        params=NoParams,
        build=_length,
        higher_is_better=None,
        unit="characters",
        needs=frozenset({"completion"}),
    )


def _of_models() -> Iterator[MetricSpec[Any]]:
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
    yield MetricSpec(
        name="student-kl",
        summary="Mean reverse KL divergence to the teacher on the model's own answers",
        params=NoParams,
        build=_student_kl,
        higher_is_better=False,
        needs=frozenset({"completion", "student-kl"}),
        unit="nats/token",
    )
    yield MetricSpec(
        name="exposure-bias",
        summary="Excess error accumulated on the model's own answers (ExAccErr)",
        params=ExposureParams,
        build=_exposure_bias,
        key=lambda params: f"exposure-bias-{params.tokens}",
        higher_is_better=False,
        needs=frozenset({"completion", "exposure"}),
        unit="%",
        version=2,
    )

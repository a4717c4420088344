from __future__ import annotations

import math
import subprocess
import sys

import pytest
from metric_helpers import SPECS, build, key, linked_mean, predict, score
from pydantic import ValidationError

from kdkit.api import DataError, MetricSpec, Prediction
from kdkit.plugins.metrics.exact import normalized


def test_what_each_metric_declares():
    assert all(isinstance(spec, MetricSpec) for spec in SPECS.values())
    assert {
        name: (spec.higher_is_better, set(spec.needs), spec.unit)
        for name, spec in SPECS.items()
        if not callable(spec.higher_is_better)
    } == {
        "rouge-l": (True, {"completion", "reference"}, "0-100"),
        "chrf": (True, {"completion", "reference"}, "0-100"),
        "exact-match": (True, {"completion", "reference"}, "0-100"),
        "code-exact": (True, {"completion", "reference"}, "0-100"),
        "parse-rate": (True, {"completion"}, "0-100"),
        "pass-at-k": (True, {"completion", "verdict"}, "0-100"),
        "distinct-n": (None, {"completion"}, "0-100"),
        "length": (None, {"completion"}, "characters"),
        "perplexity": (False, {"nll"}, "per token"),
        "teacher-kl": (False, {"teacher-kl"}, "nats/token"),
        "student-kl": (False, {"completion", "student-kl"}, "nats/token"),
        "exposure-bias": (False, {"completion", "exposure"}, "%"),
    }
    assert {name: spec.extras for name, spec in SPECS.items() if spec.extras} == {
        "chrf": ("chrf",),
        "hf-evaluate": ("evaluate",),
    }
    hf = SPECS["hf-evaluate"]
    assert [hf.direction(hf.params(name="wer", higher_is_better=way)) for way in (True, False, None)] == [
        True,
        False,
        None,
    ]
    assert SPECS["length"].direction(SPECS["length"].params()) is None


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("rouge-l", {}, "rouge-l"),
        ("rouge-l", {"tokenizer": "paper"}, "rouge-l"),
        ("rouge-l", {"tokenizer": "unicode"}, "rouge-l-unicode"),
        ("rouge-l", {"tokenizer": "code"}, "rouge-l-code"),
        ("rouge-l", {"use_stemmer": True}, "rouge-l"),
        ("rouge-l", {"use_stemmer": False}, "rouge-l-unstemmed"),
        ("rouge-l", {"tokenizer": "unicode", "use_stemmer": False}, "rouge-l-unicode"),
        ("rouge-l", {"tokenizer": "unicode", "use_stemmer": True}, "rouge-l-unicode-stemmed"),
        ("rouge-l", {"tokenizer": "code", "use_stemmer": False}, "rouge-l-code"),
        ("exact-match", {}, "exact-match"),
        ("exact-match", {"normalize": False}, "exact-match-raw"),
        ("code-exact", {}, "code-exact"),
        ("code-exact", {"language": "any"}, "code-exact-any"),
        ("code-exact", {"docstrings": False}, "code-exact-no-docstrings"),
        ("pass-at-k", {}, "pass-at-1"),
        ("pass-at-k", {"k": 10}, "pass-at-10"),
        ("distinct-n", {}, "distinct-2"),
        ("distinct-n", {"n": 4}, "distinct-4"),
        ("exposure-bias", {}, "exposure-bias-15"),
        ("chrf", {}, "chrf"),
        ("length", {}, "length"),
    ],
)
def test_keys_in_reports(name, given, expected):
    assert key(name, **given) == expected


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_is_documented(name):
    params = SPECS[name].params
    assert params.__doc__
    assert {field for field, info in params.model_fields.items() if not info.description} == set()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("rouge-l", {"tokenizer": "code", "use_stemmer": True}, "tokenizer code has none"),
        ("rouge-l", {"tokenizer": "words"}, "'paper', 'unicode' or 'code'"),
        ("code-exact", {"language": "any", "docstrings": False}, "needs language: python"),
        ("pass-at-k", {"k": 0}, "greater than or equal to 1"),
        ("distinct-n", {"n": 0}, "greater than or equal to 1"),
        ("exposure-bias", {"tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_parameters_out_of_place(name, given, message):
    with pytest.raises(ValidationError, match=message):
        build(name, **given)


def test_the_plugin_module_is_light():
    code = (
        "import sys, kdkit.plugins.metrics.plugin;"
        "print(sorted({'torch', 'transformers', 'nltk', 'rouge_score', 'absl', 'numpy', 'sacrebleu', 'lxml'} "
        "& set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


HOSTILE = {
    "empty": "",
    "white space": " \n\t\u3000\u2028 ",
    "100 kB of words": "ab cd " * 17_000,
    "100 kB without a space": "x" * 100_000,
    "100 kB of brackets": "([{" * 33_000,
    "100 kB of quotes": "\"'\\" * 33_000,
    "100 kB of backticks": "`" * 100_000 + "a`",
    "100 kB of y": "y" * 100_000,
    "NUL": "a\0b",
    "lone surrogate": "a \ud800 b",
    "Arabic": "مرحبا بالعالم \u202e x",
    "Chinese": "你好，世界",
    "emoji": "👩\u200d👧 🇪🇸",
}
BY_TEXT = [name for name, spec in SPECS.items() if spec.needs == {"completion"}]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(
    ("name", "given"),
    [*((name, {}) for name in BY_TEXT), *(("rouge-l", {"tokenizer": t}) for t in ("unicode", "code"))],
)
def test_text_of_any_kind_gets_a_score(name, given, text):
    if name == "chrf":
        pytest.importorskip("sacrebleu")
    # The last answer has words, so that distinct-n has an example to score.
    result = score(name, (text, text), (text, "x y"), ("x y", text), ("x y", "x y"), **given)
    assert result.value == pytest.approx(linked_mean(result))
    if SPECS[name].unit == "0-100":
        assert all(0.0 <= value <= 100.0 + 1e-9 for value in result.per_example)
    if name in ("exact-match", "code-exact"):
        assert result.per_example[0] == 100.0


# --- exact-match ------------------------------------------------------------------------------------------------------


def test_exact_match():
    result = score("exact-match", ("  The ANSWER,  is 42!", "x", "the answer is 42"), ("a", "b"), ("", ""), ("x", "!"))
    assert result.per_example == (100.0, 0.0, 100.0, 0.0)
    assert (result.value, result.n, result.ids) == (50.0, 4, ("id0", "id1", "id2", "id3"))


def test_exact_match_without_normalisation():
    assert score("exact-match", ("a b", "A b"), ("a b", "a b"), normalize=False).per_example == (0.0, 100.0)


def test_only_ascii_punctuation_is_dropped():
    assert normalized("¿Qué?  It's\n\ta-b") == "¿qué its ab"


@pytest.mark.parametrize("name", ["rouge-l", "exact-match", "code-exact", "chrf"])
def test_predictions_without_references_are_left_out_and_counted(name):
    if name == "chrf":
        pytest.importorskip("sacrebleu")
    assert score(name, ("x", "x")).counts == {}
    result = build(name).score([*predict(("x",), ("x", "x")), Prediction("p", "x", ["x"])])
    assert (result.n, result.value, result.ids) == (2, 100.0, ("id1", "2"))
    assert result.counts == {"predictions without references": 1}
    for nothing in ([], predict(("x",))):
        with pytest.raises(DataError, match=f"none of {len(nothing)} predictions has a reference") as error:
            build(name).score(nothing)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rouge-l", "exact-match", "code-exact"])
def test_order_does_not_matter(name):
    pairs = [("a b c", "a c"), ("x", "y"), ("the same", "the same"), ("a", "a b c d e f")]
    assert score(name, *pairs).value == score(name, *reversed(pairs)).value


# --- per-token means --------------------------------------------------------------------------------------------------


def measured(*rows):
    return [Prediction("p", "", (), id=f"id{n}", measures=row) for n, row in enumerate(rows)]


def test_perplexity_is_over_tokens_and_not_over_examples():
    result = build("perplexity").score(measured({"nll": 2.0, "tokens": 1}, {"nll": 6.0, "tokens": 7}))
    assert result.value == pytest.approx(math.e)
    assert result.per_example == pytest.approx((2.0, 6 / 7))
    assert (result.weights, result.link, result.n) == ((1.0, 7.0), "exp", 2)
    assert linked_mean(result) == pytest.approx(result.value)


def test_teacher_kl():
    rows = measured({"teacher_kl": 1.0, "nll": 9.0, "tokens": 2}, {"teacher_kl": 0.0, "tokens": 6})
    result = build("teacher-kl").score(rows)
    assert (result.value, result.per_example, result.weights) == (0.125, (0.5, 0.0), (2.0, 6.0))
    assert (result.link, result.ids) == ("identity", ("id0", "id1"))


def test_predictions_without_the_measure_or_a_token_are_left_out():
    rows = measured({}, {"nll": 1.0}, {"tokens": 3}, {"nll": 0.0, "tokens": 0}, {"nll": 4.0, "tokens": 4})
    result = build("perplexity").score(rows)
    assert (result.n, result.ids, result.value) == (1, ("id4",), pytest.approx(math.e))
    assert result.counts == {"predictions without tokens to measure": 4}
    with pytest.raises(DataError, match="none of 4 predictions has the measure 'nll' of a token"):
        build("perplexity").score(rows[:4])


@pytest.mark.parametrize(
    "row", [{"nll": math.nan, "tokens": 2}, {"nll": math.inf, "tokens": 2}, {"nll": 1, "tokens": -1}]
)
def test_a_measure_that_is_no_number_names_its_row(row):
    with pytest.raises(DataError, match=r"^example id1: nll is "):
        build("perplexity").score(measured({"nll": 1.0, "tokens": 1}, row))


def test_a_perplexity_beyond_floats_is_an_error():
    with pytest.raises(DataError, match=r"exp\(800\.0\)"):
        build("perplexity").score(measured({"nll": 1600.0, "tokens": 2}))

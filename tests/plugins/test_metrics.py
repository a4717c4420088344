from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from kdkit.api import DataError, MetricSpec, Prediction
from kdkit.plugins.metrics import plugin
from kdkit.plugins.metrics.exact import normalized
from kdkit.plugins.metrics.rouge import UnicodeWords

SPECS = {spec.name: spec for spec in plugin.kdkit_metrics()}


def build(name, **given):
    return SPECS[name].build(SPECS[name].params.model_validate_json(json.dumps(given)))


def predict(*pairs):
    return [Prediction("p", text, references, id=f"id{n}") for n, (text, *references) in enumerate(pairs)]


def score(name, *pairs, **given):
    return build(name, **given).score(predict(*pairs))


def linked_mean(result):
    weights = result.weights or (1.0,) * result.n
    mean = sum(w * x for w, x in zip(weights, result.per_example, strict=True)) / sum(weights)
    return math.exp(mean) if result.link == "exp" else mean


def test_what_each_metric_declares():
    assert all(isinstance(spec, MetricSpec) for spec in SPECS.values())
    assert {name: (spec.higher_is_better, set(spec.needs), spec.unit) for name, spec in SPECS.items()} == {
        "rouge-l": (True, {"completion"}, "0-100"),
        "rouge-l-unicode": (True, {"completion"}, "0-100"),
        "exact-match": (True, {"completion"}, "0-100"),
        "perplexity": (False, {"nll"}, "per token"),
        "teacher-kl": (False, {"teacher-kl"}, "nats/token"),
    }


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_is_documented(name):
    params = SPECS[name].params
    assert params.__doc__
    assert {field for field, info in params.model_fields.items() if not info.description} == set()


def test_the_plugin_module_is_light():
    code = (
        "import sys, kdkit.plugins.metrics.plugin;"
        "print(sorted({'torch', 'transformers', 'nltk', 'rouge_score', 'absl', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- rouge-l ----------------------------------------------------------------------------------------------------------

words = st.lists(st.sampled_from(["the", "running", "runner", "cats", "cat", "año", "x==y", "42", "\n"]), max_size=15)
sentences = words.map(" ".join)


@given(
    st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=1, max_size=6), st.booleans()
)
def test_rouge_l_is_that_of_the_package(rows, stem):
    result = score("rouge-l", *((text, *references) for text, references in rows), use_stemmer=stem)
    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    expected = [100 * scorer.score_multi(references, text)["rougeL"].fmeasure for text, references in rows]
    assert result.per_example == pytest.approx(expected, rel=0, abs=1e-12)
    assert result.value == pytest.approx(sum(expected) / len(expected), rel=0, abs=1e-10)
    assert result.value == pytest.approx(linked_mean(result), abs=1e-10)


def test_rouge_l_by_hand():
    # The longest common subsequence of "the cat sat" and "the cat sat down here" is 3: P = 1, R = 3/5, F = 0.75.
    result = score("rouge-l", ("the cat sat", "the cat sat down here", "no"), ("", "x"), ("x", ""), ("", ""))
    assert result.per_example == pytest.approx((75.0, 0.0, 0.0, 0.0))
    assert (result.n, result.value) == (4, pytest.approx(18.75))
    assert result.ids == ("id0", "id1", "id2", "id3")
    assert (result.weights, result.link) == (None, "identity")


def test_stemming_is_on_by_default():
    assert score("rouge-l", ("was", "wa")).value == 0.0
    assert score("rouge-l", ("connections", "connected")).value == 100.0
    assert score("rouge-l", ("connections", "connected"), use_stemmer=False).value == 0.0


def test_known_blind_spots_of_the_package_and_the_unicode_variant():
    assert score("rouge-l", ("mañana", "ma ana")).value == 100.0
    assert score("rouge-l-unicode", ("mañana", "ma ana")).value == 0.0
    assert score("rouge-l", ("你好", "你好")).value == 0.0
    assert score("rouge-l-unicode", ("你好吗", "你好")).value == pytest.approx(80.0)
    assert score("rouge-l-unicode", ("¿Qué MAÑANA?", "que\u0301 man\u0303ana")).value == 100.0


def test_unicode_words():
    split = UnicodeWords(use_stemmer=False).tokenize
    assert split("L'État, c'est moi: 3.5 €_x") == ["l", "état", "c", "est", "moi", "3", "5", "x"]
    assert split("हिन्दी में") == ["हिन्दी", "में"]
    assert split("\u200b \ufeff\n") == []
    assert UnicodeWords(use_stemmer=True).tokenize("connections ran") == ["connect", "ran"]


# --- exact-match ------------------------------------------------------------------------------------------------------


def test_exact_match():
    result = score("exact-match", ("  The ANSWER,  is 42!", "x", "the answer is 42"), ("a", "b"), ("", ""), ("x", "!"))
    assert result.per_example == (100.0, 0.0, 100.0, 0.0)
    assert (result.value, result.n, result.ids) == (50.0, 4, ("id0", "id1", "id2", "id3"))


def test_exact_match_without_normalisation():
    assert score("exact-match", ("a b", "A b"), ("a b", "a b"), normalize=False).per_example == (0.0, 100.0)


def test_only_ascii_punctuation_is_dropped():
    assert normalized("¿Qué?  It's\n\ta-b") == "¿qué its ab"


@pytest.mark.parametrize("name", ["rouge-l", "rouge-l-unicode", "exact-match"])
def test_predictions_without_references_are_left_out(name):
    result = build(name).score([*predict(("x",), ("x", "x")), Prediction("p", "x", ["x"])])
    assert (result.n, result.value, result.ids) == (2, 100.0, ("id1", "2"))
    for nothing in ([], predict(("x",))):
        with pytest.raises(DataError, match=f"none of {len(nothing)} predictions has a reference") as error:
            build(name).score(nothing)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rouge-l", "rouge-l-unicode", "exact-match"])
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
    with pytest.raises(DataError, match="none of 4 predictions has the measures 'nll' and 'tokens'"):
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

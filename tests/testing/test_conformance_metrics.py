"""The built-in metrics keep the contract, and the suite catches metrics that do not."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))

from hf_scripts import MEAN, POOLED, own_caches, write_script
from suites import check, checks_of, variant

from kdkit.api import DataError, MetricResult, Prediction
from kdkit.plugins.metrics import plugin
from kdkit.testing.conformance import MetricConformance

SPECS = {spec.name: spec for spec in plugin.kdkit_metrics()}
PROGRAMS = ("x = 1", "def f(:", "print(1)\n", "for", "```python\ny = 2\n```", "no program at all")


def measured():
    """Answers with everything that an evaluation can know about them."""
    rows = MetricConformance().predictions()
    traces = {
        "own_kl": (0.5, 0.25, 0.0, 1.0), "own_reverse_kl": (0.1, 0.0, 0.5), "teacher_answer_kl": (0.25, 0.25, 0.125),
    }  # fmt: skip
    return [
        replace(
            row,
            verdict=index % 3 == 0,
            measures={"nll": 4.0 + index, "teacher_kl": 0.5 * index, "tokens": 3.0 + index},
            traces={name: tuple((index + 1) ** 0.5 * value for value in trace) for name, trace in traces.items()},
        )
        for index, row in enumerate(rows)
    ]


class BuiltIn(MetricConformance):
    name, range = "", (0.0, 100.0)

    def build(self):
        return SPECS[self.name].build(SPECS[self.name].params())

    def predictions(self):
        return measured()


class TestRougeL(BuiltIn):
    name = "rouge-l"


class TestChrF(BuiltIn):
    name = "chrf"

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("sacrebleu")


class TestExactMatch(BuiltIn):
    name = "exact-match"


class TestCodeExact(BuiltIn):
    name = "code-exact"

    def predictions(self):
        return [Prediction("p", text, ("x = 1",), id=str(n)) for n, text in enumerate(PROGRAMS)]


class TestParseRate(BuiltIn):
    name = "parse-rate"

    def predictions(self):
        return [Prediction("p", text, (), id=str(n)) for n, text in enumerate(PROGRAMS)]


class TestPassAtK(BuiltIn):
    name = "pass-at-k"


class TestDistinctN(BuiltIn):
    name = "distinct-n"

    def predictions(self):
        texts = ("a b a b a b", "one two three", "x y", "to be or not to be", "p q p q", "some more words here")
        return [Prediction("p", text, (), id=str(n)) for n, text in enumerate(texts)]


class TestLength(BuiltIn):
    name, range = "length", (0.0, 1e9)


class TestPerplexity(BuiltIn):
    name, range = "perplexity", (1.0, 1e9)


class TestTeacherKL(BuiltIn):
    name, range = "teacher-kl", (0.0, 1e9)


class TestStudentKL(BuiltIn):
    name, range = "student-kl", (0.0, 1e9)


class TestExposureBias(BuiltIn):
    name, range = "exposure-bias", (-100.0, 1e9)


class HfEvaluate(BuiltIn):
    name, body, __test__ = "hf-evaluate", "", False

    @pytest.fixture(autouse=True)
    def _script(self, tmp_path, monkeypatch):
        pytest.importorskip("evaluate")
        own_caches(tmp_path, monkeypatch)
        type(self).path = Path(write_script(tmp_path, body=self.body))

    def build(self):
        return SPECS[self.name].build(SPECS[self.name].params(name="words", path=self.path, value="words"))


class TestHfEvaluateWithValuesPerExample(HfEvaluate):
    range, body, __test__ = (0.0, 100.0), MEAN, True


class TestHfEvaluateOfTheCorpus(HfEvaluate):
    range, body, corpus, __test__ = (0.0, 1.0), POOLED, True, True


def test_every_built_in_metric_is_here():
    assert {suite.name for suite in BuiltIn.__subclasses__()} == set(SPECS)


# -- wrong metrics


class Right:
    """Share of the reference's words that the answer has, times 100; for others to spoil."""

    def score(self, predictions):
        scored = [(row.id, self.one(row)) for row in predictions if self.usable(row)]
        if not scored:
            raise DataError(f"none of {len(predictions)} predictions has a reference")
        values = tuple(value for _, value in scored)
        return self.result(values, tuple(name for name, _ in scored))

    def usable(self, row):
        return bool(row.references and row.references[0].split())

    def one(self, row):
        wanted = set(row.references[0].split())
        return 100.0 * len(wanted & set(row.text.split())) / len(wanted)

    def result(self, values, ids):
        return MetricResult(value=sum(values) / len(values), per_example=values, n=len(values), ids=ids)


def with_result(change):
    def result(self, values, ids):
        found = Right.result(self, values, ids)
        return replace(found, **change(found))

    return type("Wrong", (Right,), {"result": result})


class Constant(Right):
    def one(self, row):
        return 50.0


class OfTheLastOnly(Right):
    def result(self, values, ids):
        return replace(super().result(values, ids), value=values[-1], per_example=(values[-1],) * len(values))


class ANumber(Right):
    def score(self, predictions):
        return 0.5


class LeavesOutTheFirst(Right):
    def score(self, predictions):
        found = super().score(predictions[1:])
        return replace(found, value=50.0)


class Drawn(Right):
    def score(self, predictions):
        return super().score(random.choices(predictions, k=len(predictions)))


class Remembers(Right):
    seen = 0

    def score(self, predictions):
        self.seen += 1
        return super().score(predictions[: len(predictions) - self.seen + 1])


class ComparesWithTheFirst(Right):
    def score(self, predictions):
        self.first = predictions[0].references if predictions else ()
        return super().score([replace(row, references=self.first) for row in predictions])


class WithoutDuplicates(Right):
    def score(self, predictions):
        return super().score(list({row.text: row for row in predictions}.values()))


class Sum(Right):
    def result(self, values, ids):
        scaled = tuple(len(values) * value / 16 for value in values)
        return super().result(scaled, ids)


class WritesNotes(Right):
    def one(self, row):
        row.extra["seen"] = True
        return super().one(row)


class ZeroForNothing(Right):
    def score(self, predictions):
        return super().score(predictions) if predictions else MetricResult(value=0.0, per_example=(0.0,), n=1)


class TwoLines(Right):
    def score(self, predictions):
        if not predictions:
            raise DataError("nothing\nto score")
        return super().score(predictions)


class DividesByTheWords(Right):
    def one(self, row):
        return 100.0 * len(set(row.text.split()) & set(row.references[0].split())) / len(row.text.split())

    def usable(self, row):
        return super().usable(row) and row.text != ""


class NotANumberWhenEmpty(Right):
    def one(self, row):
        return super().one(row) if row.text.strip() else float("nan")


class QuotesTheAnswer(Right):
    def one(self, row):
        if not row.text.isprintable():
            raise DataError(f"cannot read {row.text}")
        return super().one(row)


class Ranks(Right):
    """The right values, the smallest one first."""

    def result(self, values, ids):
        return super().result(tuple(sorted(values)), ids)


class NeedsReferences(Right):
    def usable(self, row):
        return bool(row.references[0].split())


TELLS, WHOLE = "test_your_predictions_tell_something", "test_a_result_is_whole"
MEAN_OF, TWICE = "test_the_value_is_the_mean_of_the_examples", "test_the_same_twice_and_from_another_instance"
ORDER, DOUBLE = "test_the_order_does_not_matter", "test_every_row_twice_has_the_same_value"
STAY, NONE = "test_the_predictions_stay_as_they_are", "test_no_predictions_are_undefined"
ANSWER, PARTS = "test_no_answer_makes_it_raise", "test_missing_parts_make_it_raise_nothing_else"
WRONG = [
    (Constant, TELLS, "the same value"),
    (with_result(lambda r: {"value": 2 * r.value + 1}), MEAN_OF, "the mean of the examples"),
    (with_result(lambda r: {"weights": (1.0,)}), MEAN_OF, "1 weights for"),
    (with_result(lambda r: {"weights": (-1.0,) * r.n}), MEAN_OF, "a weight is no number of 0 or more"),
    (with_result(lambda r: {"link": "exp"}), MEAN_OF, "the mean of the examples"),
    (with_result(lambda r: {"value": 300.0}), WHOLE, "outside 0.0 to 100.0"),
    (with_result(lambda r: {"value": float("nan")}), WHOLE, "the value is nan"),
    (ANumber, WHOLE, "float is no MetricResult"),
    (with_result(lambda r: {"n": r.n - 1}), WHOLE, r"n is \d, of \d values"),
    (with_result(lambda r: {"ids": r.ids[:-1] or ("row-0",) * 2}), WHOLE, r"n is \d, of \d ids"),
    (
        with_result(lambda r: {"n": 2 * r.n, "ids": 2 * r.ids, "per_example": 2 * r.per_example}),
        WHOLE,
        r"n is \d+, of \d predictions",
    ),
    (with_result(lambda r: {"counts": {"": 1}}), WHOLE, "a count without words"),
    (with_result(lambda r: {"ids": ("unknown",) * r.n}), WHOLE, "ids that no prediction has"),
    (with_result(lambda r: {"per_example": (float("inf"),) * r.n}), WHOLE, "not finite"),
    (with_result(lambda r: {"counts": {"left out": 0}}), WHOLE, "only what occurred"),
    (Drawn, TWICE, "a second call|after another call|another instance"),
    (Remembers, TWICE, "a second call"),
    (OfTheLastOnly, ORDER, "in another order"),
    (ComparesWithTheFirst, ORDER, "in another order"),
    (LeavesOutTheFirst, ORDER, "other examples are scored"),
    (Ranks, ORDER, "in another order, example row-"),
    (WithoutDuplicates, DOUBLE, "n is|every row twice"),
    (Sum, DOUBLE, "every row twice: the value is"),
    (WritesNotes, STAY, "a prediction was changed"),
    (ZeroForNothing, NONE, "no predictions have the value 0.0"),
    (TwoLines, NONE, "more than one line"),
    (DividesByTheWords, ANSWER, "division by zero"),
    (NotANumberWhenEmpty, ANSWER, "the value is nan"),
    (QuotesTheAnswer, ANSWER, "more than one line|control characters"),
    (NeedsReferences, PARTS, "out of range"),
]


class RightOfAll(Right):
    """One number for all answers together, with an interval of its own."""

    def result(self, values, ids):
        return MetricResult(value=sum(values) / len(values), per_example=(), n=len(values), ci95=(0.0, 100.0))


def of_all(change):
    def result(self, values, ids):
        return replace(RightOfAll.result(self, values, ids), **change)

    return type("Wrong", (RightOfAll,), {"result": result})


WRONG_OF_ALL = [
    ({"per_example": (1.0,)}, WHOLE, "n is 8, of 1 values|an interval of its own"),
    ({"per_example": (40.0,) * 8, "ci95": None}, MEAN_OF, "the mean of the examples 40.0"),
    ({"ids": ("row-0",)}, WHOLE, "ids, of a metric without values per example"),
    ({"ci95": (60.0, 40.0)}, WHOLE, "the interval is 60.0 to 40.0"),
    ({"ci95": (-1.0, 40.0)}, WHOLE, "the interval begins at -1.0"),
    ({"ci95": (1.0, 400.0)}, WHOLE, "the interval ends at 400.0"),
    ({"value": 40.0}, TELLS, "the same value"),
]


def suite_of_all(metric):
    return variant(MetricConformance, build=metric, range=(0.0, 100.0), corpus=True)


@pytest.mark.parametrize(("change", "test", "reason"), WRONG_OF_ALL)
def test_a_wrong_metric_of_all_answers_fails(change, test, reason, tmp_path):
    with pytest.raises(AssertionError, match=reason):
        check(suite_of_all(of_all(change)), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(MetricConformance))
def test_a_right_metric_of_all_answers_passes(test, tmp_path):
    check(suite_of_all(RightOfAll), test, tmp_path)


def test_an_interval_beside_values_per_example_is_wrong(tmp_path):
    with pytest.raises(AssertionError, match="an interval of its own"):
        check(suite(with_result(lambda r: {"ci95": (0.0, 1.0)})), WHOLE, tmp_path)


def suite(metric):
    return variant(MetricConformance, build=metric, range=(0.0, 100.0))


@pytest.mark.parametrize(("metric", "test", "reason"), WRONG)
def test_a_wrong_metric_fails(metric, test, reason, tmp_path):
    with pytest.raises((AssertionError, ArithmeticError, IndexError), match=reason):
        check(suite(metric), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(MetricConformance))
def test_a_right_metric_passes_and_no_test_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    check(suite(Right), test, tmp_path)


def test_five_predictions_are_too_few(tmp_path):
    few = variant(suite(Right), predictions=lambda: MetricConformance().predictions()[:5])
    with pytest.raises(AssertionError, match="give six predictions or more"):
        check(few, TELLS, tmp_path)

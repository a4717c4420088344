from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_helpers import build, linked_mean

from kdkit.api import DataError, Prediction
from kdkit.plugins.metrics.pass_at_k import pass_at_k


def samples(**verdicts):
    return [
        Prediction("p", "", (), id=key, sample=n, verdict=verdict)
        for key, given in verdicts.items()
        for n, verdict in enumerate(given)
    ]


# --- pass-at-k --------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_good_answer(verdicts, k):
    if k > len(verdicts):
        return
    subsets = list(itertools.combinations(verdicts, k))
    expected = 100.0 * sum(map(any, subsets)) / len(subsets)
    result = build("pass-at-k", k=k).score(samples(a=verdicts))
    assert result.per_example == pytest.approx((expected,))


def test_pass_at_k_of_many_answers():
    for n, passed, k in [(10_000, 3, 100), (100_000, 1, 50_000), (200, 100, 100), (1000, 999, 2), (5, 0, 5), (5, 5, 1)]:
        exact = 1 - Fraction(math.comb(n - passed, k), math.comb(n, k)) if n <= 10_000 else Fraction(k, n)
        assert pass_at_k(n, passed, k) == pytest.approx(float(exact), rel=1e-9, abs=0)


def test_pass_at_k_is_a_mean_over_examples_and_counts_what_nobody_judged():
    predictions = samples(a=[True, False, None], b=[False, None, False, False], c=[True, None, None], d=[None] * 3)
    random.Random(0).shuffle(predictions)
    result = build("pass-at-k", k=2).score(predictions)
    assert dict(zip(result.ids, result.per_example, strict=True)) == {"a": 100.0, "b": 0.0}
    assert (result.value, result.n, result.weights) == (50.0, 2, None)
    assert result.counts == {"answers without a verdict": 7, "examples with fewer than 2 judged answers": 2}
    first = build("pass-at-k").score(predictions)
    assert dict(zip(first.ids, first.per_example, strict=True)) == {"a": 50.0, "b": 0.0, "c": 100.0}
    assert build("pass-at-k").score(samples(a=[True])).counts == {}


def test_pass_at_k_without_verdicts_is_an_error():
    with pytest.raises(DataError, match=r"none of 2 examples has 2 judged answers \(3 answers, 1 without a verdict\)"):
        build("pass-at-k", k=2).score(samples(a=[True], b=[False, None]))
    with pytest.raises(DataError, match="none of 0 examples"):
        build("pass-at-k").score([])


def test_answers_without_an_id_are_examples_of_their_own():
    result = build("pass-at-k").score([Prediction("p", "", (), verdict=verdict) for verdict in (True, False)])
    assert (result.per_example, result.ids) == ((100.0, 0.0), ("0", "1"))


# --- distinct-n and length --------------------------------------------------------------------------------------------


def answers(**texts):
    return [Prediction("p", text, (), id=key, sample=n) for key, given in texts.items() for n, text in enumerate(given)]


def test_distinct_n_by_hand():
    # Every answer by itself: "x y", "y x", "x y" and, in the other answer to a, "x y", "y z".
    rows = answers(a=["x y x y", "X, y z"], b=["x x x"], c=["one"], d=["", "!"])
    result = build("distinct-n").score(rows)
    assert result.ids == ("a", "a", "b")
    assert result.per_example == pytest.approx((200 / 3, 100.0, 50.0))
    assert (result.value, result.n) == (pytest.approx(650 / 9), 3)
    assert result.counts == {"answers of fewer than 2 words": 3}
    single = build("distinct-n", n=1).score(rows)
    assert single.per_example == pytest.approx((50.0, 100.0, 100 / 3, 100.0))
    assert build("distinct-n", n=3).score(rows).per_example == pytest.approx((100.0, 100.0, 100.0))


def test_distinct_n_does_not_depend_on_the_number_of_samples():
    one = build("distinct-n").score(answers(a=["x y x y"], b=["x x x"])).value
    assert build("distinct-n").score(answers(a=["x y x y"] * 3, b=["x x x"] * 3)).value == pytest.approx(one)


def test_distinct_n_of_other_scripts():
    assert build("distinct-n", n=1).score(answers(a=["你好你好"])).value == 50.0
    assert build("distinct-n", n=1).score(answers(a=["año ano"])).value == 100.0


def test_distinct_n_without_words_is_an_error():
    with pytest.raises(DataError, match="distinct-4: none of 2 answers has 4 words"):
        build("distinct-n", n=4).score(answers(a=["one two three"], b=[""]))


def test_length():
    result = build("length").score(answers(a=[" año \n", "你好\0"], b=["", "  "], c=["a b\n\nc"]))
    assert result.per_example == (3.0, 3.0, 0.0, 0.0, 6.0)
    assert (result.value, result.ids) == (pytest.approx(2.4), ("a", "a", "b", "b", "c"))
    with pytest.raises(DataError, match="no predictions"):
        build("length").score([])


# --- student-kl -------------------------------------------------------------------------------------------------------


def own(*traces):
    return [Prediction("p", "", (), id=f"id{n}", traces={"own_reverse_kl": trace}) for n, trace in enumerate(traces)]


def test_student_kl_is_a_mean_over_tokens():
    result = build("student-kl").score([*own((1.0, 2.0, 3.0), (6.0,), ()), Prediction("p", "", (), id="none")])
    assert result.value == pytest.approx(3.0)
    assert result.per_example == pytest.approx((2.0, 6.0))
    assert (result.weights, result.n, result.ids) == ((3, 1), 2, ("id0", "id1"))
    assert result.counts == {"predictions without tokens to measure": 2}


def test_student_kl_reads_its_own_trace_only():
    other = Prediction("p", "", (), id="x", traces={"own_kl": (9.0,)}, measures={"teacher_kl": 9.0, "tokens": 1.0})
    assert build("student-kl").score([*own((1.0,)), other]).value == pytest.approx(1.0)
    with pytest.raises(DataError, match="none of 1 predictions has the measure 'own_reverse_kl'"):
        build("student-kl").score([other])
    for wrong in (math.nan, math.inf):
        with pytest.raises(DataError, match="example id0"):
            build("student-kl").score(own((1.0, wrong)))


# --- exposure-bias ----------------------------------------------------------------------------------------------------


def traced(*rows):
    return [
        Prediction("p", "", (), id=f"id{n}", traces={"own_kl": tuple(own), "teacher_answer_kl": tuple(teachers)})
        for n, (own, teachers) in enumerate(rows)
    ]


def test_exposure_bias_by_hand():
    # R = (3 + 2) / 2, eps = (1 + 3) / 2: a quarter more on the model's own answers.
    result = build("exposure-bias", tokens=2).score(traced(([1, 2, 99], [0.5, 0.5]), ([2, 0], [2, 1, 99])))
    assert result.value == pytest.approx(25.0)
    assert result.per_example == pytest.approx((200.0, -100 / 3))
    assert result.weights == pytest.approx((1.0, 3.0))
    assert (result.n, result.ids, result.counts) == (2, ("id0", "id1"), {})
    assert linked_mean(result) == pytest.approx(result.value)


def test_the_first_token_counts():
    result = build("exposure-bias", tokens=1).score(traced(([3, 0], [1, 7])))
    assert result.value == pytest.approx(200.0)
    # The code of the paper slices from the second token, and would see 0 and 7 here.
    assert build("exposure-bias", tokens=2).score(traced(([3, 0], [1, 7]))).value == pytest.approx(100 * (3 / 8 - 1))


traces = st.lists(st.floats(0, 5), max_size=6)


@given(st.lists(st.tuples(traces, traces), min_size=1, max_size=6), st.integers(1, 6))
def test_exposure_bias_is_a_ratio_of_means(rows, tokens):
    rows = [*rows, ([1.0] * tokens, [2.0] * tokens)]
    result = build("exposure-bias", tokens=tokens).score(traced(*rows))
    own, teachers = (sum(sum(row[side][: min(tokens, *map(len, row))]) for row in rows) for side in (0, 1))
    assert result.value == pytest.approx(100 * (own / teachers - 1), rel=1e-5, abs=1e-3)
    assert linked_mean(result) == pytest.approx(result.value, rel=1e-9, abs=1e-9)
    assert all(weight > 0 for weight in result.weights)


def test_an_answer_without_error_on_the_teachers_text_still_counts():
    result = build("exposure-bias", tokens=2).score(traced(([1, 1], [0, 0]), ([1, 1], [2, 2])))
    assert result.value == pytest.approx(0.0, abs=1e-3)
    assert linked_mean(result) == pytest.approx(result.value)


def test_both_answers_count_for_as_many_tokens():
    rows = traced(([2] * 15, [1] * 20), ([], [1] * 15), ([3] * 14, [1] * 4), ([1] * 5, [1] * 30), ([], []))
    result = build("exposure-bias").score(rows)
    assert (result.n, result.value) == (3, pytest.approx(100 * ((30 + 12 + 5) / 24 - 1)))
    assert result.counts == {
        "predictions without traces": 2,
        "pairs with an answer shorter than 15 tokens": 2,
    }


def test_stopping_sooner_makes_no_model_better():
    long = build("exposure-bias").score(traced(([0.6] * 15, [0.3] * 15)))
    for tokens in (1, 5):
        assert build("exposure-bias").score(traced(([0.6] * tokens, [0.3] * 15))).value == pytest.approx(long.value)


def test_one_tiny_weight_does_not_hide_a_difference():
    from kdkit.report.statistics import Bootstrap, Sample, difference

    draw = random.Random(0)
    pairs = [[draw.uniform(0.1, 0.3) for _ in range(15)] for _ in range(40)]
    for tiny in (1e-9, 0.0):
        found = []
        for scale in (1.1, 2.0):
            rows = [([x * scale for x in pair], pair if n else [tiny] * 15) for n, pair in enumerate(pairs)]
            result = build("exposure-bias").score(traced(*rows))
            found.append(Sample.of(result.per_example, result.weights, result.link, result.ids))
        assert difference(found[0], found[1], Bootstrap(0, 200)).p < 0.01


def test_predictions_without_both_traces_are_left_out():
    rows = [Prediction("p", "", (), id="x", traces={"own_kl": (1.0,)}), *traced(([2], [1])), Prediction("p", "", ())]
    result = build("exposure-bias", tokens=1).score(rows)
    assert (result.ids, result.value) == (("id0",), pytest.approx(100.0))
    assert result.counts == {"predictions without traces": 2}
    with pytest.raises(DataError, match="none of 1 predictions has traces"):
        build("exposure-bias").score(rows[:1])


def test_a_model_that_is_the_teacher_has_no_exposure_bias():
    result = build("exposure-bias", tokens=2).score(traced(([0, 0], [0, 0]), ([1e-9, 0], [0, -1e-9])))
    assert result.value == pytest.approx(0.0, abs=1e-6)
    assert linked_mean(result) == pytest.approx(result.value)


def test_an_infinite_ratio_and_a_divergence_that_is_no_number_are_errors():
    with pytest.raises(DataError, match="the ratio is infinite"):
        build("exposure-bias").score(traced(([1], [0])))
    for wrong in (math.nan, math.inf):
        with pytest.raises(DataError, match=r"^example id1: a divergence in the traces is not finite"):
            build("exposure-bias").score(traced(([1], [1]), ([1], [wrong])))

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kdkit.report.statistics import (
    Bootstrap,
    Sample,
    bounds,
    difference,
    draws,
    holm,
    interval,
    paired,
    ratio,
    score_interval,
    swap_test,
)


def sample(values, weights=None, link="identity", ids=None) -> Sample:
    return Sample.of(values, weights, link, [f"{i:05d}" for i in range(len(values))] if ids is None else ids)


def every_swap(a: Sample, b: Sample) -> float:
    """The exact p: all 2^n ways to swap who gave which (weight, value)."""

    def mean(rows):
        return math.fsum(w * x for w, x in rows) / math.fsum(w for w, _ in rows)

    rows_a, rows_b = list(zip(a.weights, a.values, strict=True)), list(zip(b.weights, b.values, strict=True))
    observed = abs(mean(rows_a) - mean(rows_b))
    count = 0
    for swaps in itertools.product((False, True), repeat=a.n):
        left = [y if s else x for x, y, s in zip(rows_a, rows_b, swaps, strict=True)]
        right = [x if s else y for x, y, s in zip(rows_a, rows_b, swaps, strict=True)]
        count += abs(mean(left) - mean(right)) >= observed - 1e-12
    return count / 2**a.n


def every_resample(s: Sample) -> np.ndarray:
    """The value of all n^n resamples."""
    index = np.array(list(itertools.product(range(s.n), repeat=s.n)))
    means = (s.weights * s.values)[index].sum(axis=1) / s.weights[index].sum(axis=1)
    return np.exp(means) if s.link == "exp" else means


def test_value_is_the_linked_weighted_mean() -> None:
    assert sample([1.0, 2.0, 6.0]).value == 3.0
    assert sample([1.0, 3.0], weights=[3, 1]).value == 1.5
    assert sample([0.0, math.log(4)], weights=[1, 1], link="exp").value == pytest.approx(2.0, rel=1e-15)


def test_examples_without_weight_are_left_out_and_ids_are_sorted() -> None:
    s = sample([5.0, 1.0, 2.0], weights=[0, 1, 3], ids=["c", "b", "a"])
    assert s.ids == ("a", "b")
    assert s.values.tolist() == [2.0, 1.0]
    assert (s.n, s.value) == (2, 1.75)


@pytest.mark.parametrize(
    ("values", "weights", "ids"),
    [
        ([1.0, math.nan], None, ["a", "b"]),
        ([1.0, 2.0], [1.0, math.inf], ["a", "b"]),
        ([1.0, 2.0], [1.0, -1.0], ["a", "b"]),
        ([1.0, 2.0], [1.0], ["a", "b"]),
        ([1.0, 2.0], None, ["a"]),
    ],
)
def test_a_sample_that_makes_no_sense_is_refused(values, weights, ids) -> None:
    with pytest.raises(ValueError):
        Sample.of(values, weights, "identity", ids)


@pytest.mark.parametrize(
    "s",
    [
        sample([1.0, 4.0, 9.0, 30.0]),
        sample([1.0, 0.2, 3.0, 2.0], weights=[10, 1, 5, 30], link="exp"),
    ],
    ids=["plain", "perplexity"],
)
def test_draws_have_the_distribution_of_all_resamples(s: Sample) -> None:
    exact, drawn = every_resample(s), draws(s, seed=3, resamples=50_000)
    for q in (0.025, 0.25, 0.5, 0.75, 0.975):
        level = np.quantile(exact, q, method="inverted_cdf")
        assert (drawn <= level + 1e-9).mean() == pytest.approx((exact <= level + 1e-9).mean(), abs=0.01)
    assert drawn.mean() == pytest.approx(exact.mean(), rel=0.01)


def test_draws_repeat_for_a_seed_and_differ_between_seeds() -> None:
    s = sample(np.arange(30.0))
    assert (draws(s, seed=1) == draws(s, seed=1)).all()
    assert (draws(s, seed=1) != draws(s, seed=2)).any()


def test_draws_do_not_depend_on_how_they_are_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    s = sample(np.arange(7.0), weights=np.arange(1.0, 8.0))
    whole = draws(s, seed=1, resamples=100)
    monkeypatch.setattr("kdkit.report.statistics._BLOCK", 21)
    assert draws(s, seed=1, resamples=100) == pytest.approx(whole, rel=1e-15)


def test_interval_of_known_draws() -> None:
    assert interval(np.arange(1.0, 1001.0)) == (25.0, 975.0)


def test_interval_is_none_without_spread_or_bound() -> None:
    assert interval(np.full(100, 3.0)) is None
    assert interval(np.zeros(100)) is None
    assert interval(np.array([1.0] * 90 + [np.inf] * 10)) is None
    assert interval(np.array([1.0, 2.0, np.nan])) is None
    assert interval(draws(sample([0.1] * 30), seed=0)) is None


def test_interval_keeps_finite_bounds_beside_infinite_draws() -> None:
    assert interval(np.array([np.inf] * 10 + list(range(990)))) == (24.0, 974.0)


@pytest.mark.parametrize(
    ("n", "make"),
    [
        (200, lambda rng, n: rng.normal(20, 20, size=n)),
        (200, lambda rng, n: (rng.random(n) < 0.3) * 100.0),
        (300, lambda rng, n: rng.beta(0.5, 1.5, size=n) * 100),
        (100, lambda rng, n: rng.beta(0.5, 1.5, size=n) * 100),
        (100, lambda rng, n: np.where(rng.random(n) < 0.6, 0.0, rng.beta(0.7, 2.0, size=n) * 100)),
        (150, lambda rng, n: 100 - rng.beta(0.3, 3.0, size=n) * 100),
    ],
    ids=["normal", "pass-or-fail", "rouge-like", "rouge-like-100", "mostly-zero", "mostly-full"],
)
def test_interval_covers_the_truth_95_times_in_100(n, make) -> None:
    rng = np.random.default_rng(2)
    truth = make(np.random.default_rng(1), 2_000_000).mean()
    covered = 0
    ids = [f"{i:05d}" for i in range(n)]
    for trial in range(1000):
        low, high = bounds(draws(sample(make(rng, n), ids=ids), seed=trial, resamples=1000))
        covered += low <= truth <= high
    assert 930 <= covered <= 970


def test_perplexity_interval_covers_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(4)

    def batch(n):
        tokens = rng.integers(5, 120, size=n)
        return np.clip(rng.normal(2.0 + 0.004 * tokens, 0.5), 0, None), tokens

    nll, tokens = batch(2_000_000)
    truth = math.exp((nll * tokens).sum() / tokens.sum())
    covered = 0
    for trial in range(1000):
        x, w = batch(200)
        low, high = bounds(draws(sample(x, w, "exp"), seed=trial, resamples=1000))
        covered += low <= truth <= high
    assert 930 <= covered <= 970


ANSWERS = 6
"""Sampled answers per problem in the tests below."""


def answered(chance, rng, *, grouped: bool) -> Sample:
    """Pass or fail of some answers to each problem; ``grouped`` says which answers belong to one problem."""
    passed = rng.random((len(chance), ANSWERS)) < chance[:, None]
    problems = np.repeat(np.arange(len(chance)), ANSWERS)
    ids = [f"{p:03d}" if grouped else f"{p:03d}/{i}" for i, p in enumerate(problems)]
    return Sample.of(100.0 * passed.ravel(), None, "identity", ids)


def coverage_over_answers(*, grouped: bool) -> float:
    rng = np.random.default_rng(6)
    covered = 0
    for trial in range(1000):
        found = answered(rng.beta(0.4, 0.8, size=100), rng, grouped=grouped)
        low, high = bounds(draws(found, seed=trial, resamples=500))
        covered += low <= 100 * 0.4 / 1.2 <= high
    return covered / 1000


def test_interval_covers_the_truth_with_several_answers_per_problem() -> None:
    assert 0.93 <= coverage_over_answers(grouped=True) <= 0.97
    # Problems differ in difficulty, so their answers are no independent examples.
    assert coverage_over_answers(grouped=False) < 0.80


def p_over_answers(*, grouped: bool) -> np.ndarray:
    """p of two models that are equally good on the whole, and each better on other problems."""
    rng = np.random.default_rng(7)
    p = np.empty(1000)
    for trial in range(1000):
        a, b = (answered(rng.beta(0.4, 0.8, size=60), rng, grouped=grouped) for _ in range(2))
        p[trial] = swap_test(a, b, seed=trial, permutations=400)
    return p


def test_p_is_not_too_small_with_several_answers_per_problem() -> None:
    grouped, single = p_over_answers(grouped=True), p_over_answers(grouped=False)
    for level in (0.01, 0.05, 0.1):
        noise = 3 * math.sqrt(level * (1 - level) / 1000)
        assert level - noise - 1 / 400 <= (grouped <= level).mean() <= level + noise
        assert (single <= level).mean() > level + 3 * noise, "ignoring the grouping should fail"


def test_answers_to_one_example_are_merged() -> None:
    s = Sample.of([1.0, 10.0, 3.0, 20.0], ids=["b", "a", "b", "a"])
    assert (s.ids, s.values.tolist(), s.weights.tolist(), s.n) == (("a", "b"), [15.0, 2.0], [1.0, 1.0], 2)
    assert s.value == np.mean([1.0, 10.0, 3.0, 20.0])


def test_merging_keeps_a_weighted_mean_and_one_answer_keeps_its_value() -> None:
    rng = np.random.default_rng(8)
    x, w = rng.normal(size=30), rng.integers(0, 9, size=30).astype(float)
    ids = [f"{i % 10:02d}" for i in range(30)]
    merged = Sample.of(x, w, ids=ids)
    assert merged.value == pytest.approx((x * w).sum() / w.sum(), rel=1e-12)
    assert merged.n == len({name for name, weight in zip(ids, w, strict=True) if weight})
    third = 1 / 3
    assert Sample.of([third], [0.1], ids=["a"]).values.tolist() == [third]


def test_an_example_with_more_answers_does_not_count_for_more() -> None:
    s = Sample.of([0.0, 0.0, 0.0, 1.0], ids=["a", "a", "a", "b"])
    assert s.value == 0.5
    weighted = Sample.of([0.0, 0.0, 0.0, 1.0], [2.0, 4.0, 6.0, 4.0], ids=["a", "a", "a", "b"])
    assert weighted.weights.tolist() == [4.0, 4.0]


def test_bootstrap_draws_examples_and_not_answers() -> None:
    s = Sample.of([0.0] * 50 + [1.0] * 50, ids=["a"] * 50 + ["b"] * 50)
    assert set(draws(s, seed=0, resamples=200).tolist()) == {0.0, 0.5, 1.0}


@pytest.mark.parametrize("what", ["difference", "retention"])
def test_paired_intervals_cover_the_truth(what: str) -> None:
    rng, n = np.random.default_rng(9), 150
    covered = 0
    for trial in range(1000):
        hard = rng.beta(0.5, 1.5, n)
        # The student has 80 % of the teacher's score on average, but not on every example.
        teacher, student = sample(100 * hard), sample(100 * hard * rng.beta(2.0, 0.5, n))
        drawn = [draws(s, seed=trial, resamples=1000) for s in (student, teacher)]
        low, high = bounds(drawn[0] - drawn[1] if what == "difference" else ratio(*drawn))
        covered += low <= (-5.0 if what == "difference" else 0.8) <= high
    assert 930 <= covered <= 970


def test_difference_interval_is_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(50, 30, size=300)
    a, b = sample(hard + 1 + rng.normal(0, 1, 300)), sample(hard)
    found = difference(a, b, Bootstrap(0))
    assert found is not None
    assert found.value == pytest.approx((a.values - b.values).mean(), rel=1e-12)
    expected = draws(sample(a.values - b.values), seed=0)
    assert found.ci95 == pytest.approx(bounds(expected), rel=1e-9)
    assert found.clear
    assert found.p == pytest.approx(1 / 10_001)


def test_perplexity_difference_draws_both_models_from_the_same_examples() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 40, size=50).astype(float)
    nll = rng.normal(2, 0.4, size=50)
    a, b = sample(nll + 0.05, tokens, "exp"), sample(nll, tokens, "exp")
    boot = Bootstrap(9)
    # Every example costs 0.05 nats more, so on any resample the ratio of perplexities is exp(0.05).
    assert boot(a) / boot(b) == pytest.approx(np.full(10_000, math.exp(0.05)), rel=1e-12)
    found = difference(a, b, boot)
    assert found is not None
    assert found.value == pytest.approx(math.exp(nll @ tokens / tokens.sum()) * math.expm1(0.05), rel=1e-12)
    assert found.p == pytest.approx(1 / 10_001)


@pytest.mark.parametrize("seed", range(4))
def test_p_agrees_with_every_swap_for_plain_means(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = sample(rng.normal(0.5, 1, 9)), sample(rng.normal(0, 1, 9))
    assert swap_test(a, b, seed=1, permutations=40_000) == pytest.approx(every_swap(a, b), abs=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_p_agrees_with_every_swap_for_perplexity_with_different_weights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = sample(rng.normal(2.3, 0.5, 9), rng.integers(1, 60, 9), "exp")
    b = sample(rng.normal(2.0, 0.5, 9), rng.integers(1, 60, 9), "exp")
    assert swap_test(a, b, seed=1, permutations=40_000) == pytest.approx(every_swap(a, b), abs=0.01)


def test_p_counts_ties_of_discrete_scores() -> None:
    # 0.1 is no binary fraction: swaps that repeat the observed difference do so only up to rounding.
    a, b = sample([0.3, 0.1, 0.2, 0.1, 0.4, 0.1]), sample([0.2, 0.2, 0.1, 0.2, 0.3, 0.2])
    assert every_swap(a, b) == 1.0
    assert swap_test(a, b, seed=0) == 1.0
    better = sample([1.0] * 4 + [0.0] * 8), sample([0.0] * 12)
    assert every_swap(*better) == 0.125
    assert swap_test(*better, seed=0, permutations=40_000) == pytest.approx(0.125, abs=0.01)


def test_p_does_not_depend_on_which_model_is_named_first() -> None:
    rng = np.random.default_rng(3)
    a = sample(rng.normal(2.2, 1, 40), rng.integers(1, 9, 40), "exp")
    b = sample(rng.normal(2, 1, 40), rng.integers(1, 9, 40), "exp")
    assert swap_test(a, b, seed=5) == pytest.approx(swap_test(b, a, seed=6), abs=0.02)


@pytest.mark.parametrize("kind", ["normal", "pass-or-fail", "perplexity"])
def test_p_is_not_too_small_when_models_do_not_differ(kind: str) -> None:
    rng = np.random.default_rng(11)
    trials, n = 1000, 40
    p = np.empty(trials)
    for trial in range(trials):
        if kind == "perplexity":
            tokens = rng.integers(1, 80, n)
            hard = rng.normal(2, 0.5, n)
            pair = [sample(hard + rng.normal(0, 0.3, n), tokens, "exp") for _ in range(2)]
        elif kind == "pass-or-fail":
            chance = rng.random(n)
            pair = [sample((rng.random(n) < chance) * 1.0) for _ in range(2)]
        else:
            hard = rng.normal(0, 2, n)
            pair = [sample(hard + rng.normal(0, 1, n)) for _ in range(2)]
        p[trial] = swap_test(*pair, seed=trial, permutations=400)
    for level in (0.01, 0.05, 0.1, 0.25, 0.5):
        noise = 3 * math.sqrt(level * (1 - level) / trials)
        assert (p <= level).mean() <= level + noise
        if kind != "pass-or-fail":
            assert (p <= level).mean() >= level - noise - 1 / 400


def test_pairs_use_common_ids_whatever_their_order() -> None:
    a = sample([1.0, 2.0, 3.0, 10.0], ids=["x", "y", "z", "only-a"])
    b = sample([30.0, 20.0, 10.0], ids=["z", "y", "x"])
    cut_a, cut_b = paired(a, b)
    assert cut_a.ids == cut_b.ids == ("x", "y", "z")
    assert cut_a.values.tolist() == [1.0, 2.0, 3.0]
    assert cut_b is b
    found = difference(a, b, Bootstrap(0))
    assert found is not None
    assert (found.value, found.n) == (-18.0, 3)


def test_nothing_in_common_is_no_difference() -> None:
    assert difference(sample([1.0], ids=["a"]), sample([1.0], ids=["b"]), Bootstrap(0)) is None
    assert difference(Sample.of([1.0, 2.0]), Sample.of([1.0, 3.0]), Bootstrap(0)) is None


def test_one_example_gives_neither_interval_nor_p() -> None:
    found = difference(sample([3.0]), sample([1.0]), Bootstrap(0))
    assert found is not None
    assert (found.value, found.ci95, found.p, found.n, found.clear) == (2.0, None, None, 1, False)


def test_equal_models_do_not_differ() -> None:
    found = difference(sample([1.0, 5.0, 2.0]), sample([1.0, 5.0, 2.0]), Bootstrap(0))
    assert found is not None
    assert (found.value, found.ci95, found.p, found.clear) == (0.0, None, 1.0, False)


def test_a_constant_difference_has_no_interval_despite_rounding() -> None:
    x = np.random.default_rng(0).normal(50, 20, 40)
    found = difference(sample(x + 1e-3), sample(x), Bootstrap(0))
    assert found is not None
    assert found.ci95 is None
    assert found.p == pytest.approx(1 / 10_001)
    assert found.clear


def test_three_examples_are_never_clear() -> None:
    found = difference(sample([10.0, 11.0, 12.0]), sample([0.0, 0.0, 1.0]), Bootstrap(0))
    assert found is not None
    assert found.ci95 is not None
    assert found.ci95[0] > 0
    assert found.p == pytest.approx(0.25, abs=0.02)
    assert not found.clear


def test_a_perplexity_beyond_floats_is_no_difference() -> None:
    huge = sample([800.0, 900.0], link="exp")
    assert huge.value == math.inf
    assert difference(huge, sample([1.0, 2.0], link="exp"), Bootstrap(0)) is None
    assert difference(huge, huge, Bootstrap(0)) is None


def test_draws_beyond_floats_leave_the_interval_open() -> None:
    edge = sample([1.0, 1400.0], link="exp")
    assert math.isfinite(edge.value)
    found = difference(edge, sample([1.0, 2.0], link="exp"), Bootstrap(0))
    assert found is not None
    assert found.ci95 is None
    assert not found.clear


def test_ratio_treats_a_denominator_at_or_below_zero_as_unbounded() -> None:
    got = ratio(np.array([1.0, 1.0, -1.0, 0.0, 2.0]), np.array([2.0, 0.0, -3.0, 0.0, -1.0]))
    assert got.tolist() == [0.5, np.inf, -np.inf, 0.0, np.inf]


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_exact_interval_of_scores_that_are_all_at_one_end() -> None:
    def of(values: Sequence[float], unit: str = "0-100", **more: Any) -> tuple[float, float] | None:
        return score_interval(Sample.of(values, **more), Bootstrap(0, 200), unit=unit)

    # Clopper and Pearson for 0 of n: at the bound, no pass at all has a chance of 2.5 %.
    low, high = of([0.0] * 40)
    assert (low, (1 - high / 100) ** 40) == (0.0, pytest.approx(0.025))
    assert of([100.0] * 40) == pytest.approx((100 - high, 100.0))
    assert of([0.0]) is None
    assert of([50.0] * 40) is None
    assert of([0.0] * 40, unit="") is None
    assert of([0.0] * 40, link="exp") is None
    assert of([0.0] * 2, weights=[1.0, 2.0]) is None
    mixed = [0.0, 100.0] * 20
    assert of(mixed) == interval(Bootstrap(0, 200)(Sample.of(mixed)))
    # Answers to one example count once.
    assert of([0.0] * 80, ids=[str(i // 2) for i in range(80)]) == (0.0, high)


def test_one_large_value_of_no_weight_does_not_make_all_swaps_alike() -> None:
    draw = np.random.default_rng(0)
    ids = [str(i) for i in range(40)]
    weights = np.ones(40)
    weights[0] = 1e-12
    a, b = draw.uniform(0, 1, 40), draw.uniform(5, 6, 40)
    a[0] = b[0] = 1e12
    samples = [Sample.of(x, weights, ids=ids) for x in (a, b)]
    assert swap_test(*samples, seed=0, permutations=2000) < 0.01

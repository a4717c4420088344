"""Intervals and tests for scores that were measured on the same examples.

A metric's value is ``link(sum(w * x) / sum(w))`` over examples: ``x`` the per-example score, ``w`` one (plain means) or
the example's token count (per-token means), ``link`` the identity or ``exp`` (perplexity).

* **Intervals** are percentile bootstraps over examples (Efron and Tibshirani 1993, chapter 13). Resamples depend only
  on the seed and on n, and samples are sorted by id, so two samples over the same ids share their resamples: a
  difference or ratio of their draws is the paired bootstrap. From 100 examples on they hold the truth 94 to 96 times
  in 100, for bounded and skewed scores as well; BCa and studentised intervals were no better there, and the latter fail
  for pass or fail. Below 50 examples all three are too narrow where scores are mostly zero. Scores of pass or fail with
  rare passes (or failures) take more examples: where 3 to 10 passes are to be expected, whatever n is, the intervals
  hold the truth 85 to 97 times in 100, and 91 to 96 where 10 to 20 are (computed from the binomial distribution).
* **Where all scores are 0, or all 100**, no resample differs. The interval is then that of Clopper and Pearson (1934)
  for no passes (or only passes) among n; for scores between 0 and 100 the mean is at most 100 times the chance of a
  score above 0, so that it holds for them as well.
* **p-values** come from a paired permutation test. If the two models were exchangeable, swapping which of them gave
  which ``(w, x)`` on any example would not change the joint distribution; each permutation swaps a random half of the
  examples and recomputes the difference of the weighted means. For plain means that is the sign-flip test on the
  per-example differences; for weighted means each example carries its weight along, so the test stays exact. The
  difference is taken before the link, which is monotone, so the hypothesis is the same and a heavy right tail of
  ``exp`` cannot dominate. Two-sided, ``p = (1 + #{|t*| >= |t|}) / (1 + permutations)`` (Phipson and Smyth 2010).

* **Several answers** to one example are not independent: they are merged into one ``(w, x)`` per example (their mean)
  before anything is resampled or swapped. Treating them as examples of their own would give intervals that are too
  narrow and p-values that are too small.

Intervals measure the choice of test examples, and of answers where they were sampled; not the training seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdkit.report import ALPHA

__all__ = [
    "PERMUTATIONS",
    "RESAMPLES",
    "Bootstrap",
    "Difference",
    "Interval",
    "Sample",
    "bounds",
    "difference",
    "draws",
    "holm",
    "interval",
    "paired",
    "ratio",
    "score_interval",
    "swap_test",
]

Array: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]

RESAMPLES: Final = 10_000
PERMUTATIONS: Final = 10_000
_TAILS: Final = (0.025, 0.975)
_BOUNDED: Final = "0-100"
"""The unit of scores that cannot be below 0 or above 100."""
_BLOCK: Final = 2_000_000
"""Random numbers held at once, so that memory stays below 100 MB whatever n is."""
_SAME: Final = 1e-12
"""Relative spread below which draws count as one value: the rounding error of a mean."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One model's per-example scores on one metric, sorted by id.

    Attributes:
        values: [n] scores; means over its answers for an example with several.
        weights: [n] positive weights.
        link: Applied to the weighted mean.
        ids: n ids, sorted; empty when the examples are anonymous and cannot be paired.
    """

    values: Array
    weights: Array
    link: Literal["identity", "exp"] = "identity"
    ids: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        weights: Sequence[float] | None = None,
        link: Literal["identity", "exp"] = "identity",
        ids: Sequence[str] = (),
    ) -> Sample:
        """A checked sample, one entry per id. Examples of weight 0 hold no token of the mean and are left out.

        An id that occurs k times becomes one example: the weighted mean of its values, with the sum of their weights
        over k. With as many answers to every example, the mean over answers is the mean over examples.

        Raises:
            ValueError: Lengths differ, a number is not finite, or a weight is negative.
        """
        x = np.asarray(values, dtype=np.float64)
        w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
        if x.ndim != 1 or x.shape != w.shape or (len(ids) not in (0, len(x))):
            raise ValueError("values, weights and ids differ in length")
        if not (np.isfinite(x).all() and np.isfinite(w).all()):
            raise ValueError("a value or weight is not finite")
        if (w < 0).any():
            raise ValueError("a weight is negative")
        names = tuple(ids)
        if names:
            x, w, names = _by_id(x, w, names)
        keep = np.flatnonzero(w > 0)
        return cls(x[keep], w[keep], link, tuple(names[i] for i in keep) if names else ())

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """The weighted mean, before the link; NaN without examples."""
        return float(self.weights @ self.values / self.weights.sum()) if self.n else float("nan")

    @property
    def value(self) -> float:
        """The metric's value; NaN without examples, infinite when ``exp`` overflows."""
        return float(_linked(np.array(self.mean), self.link))

    def only(self, ids: frozenset[str]) -> Sample:
        """The examples in ``ids``; the sample itself when that is all of them."""
        if len(ids) == self.n and ids.issuperset(self.ids):
            return self
        keep = np.array([i for i, name in enumerate(self.ids) if name in ids], dtype=np.intp)
        return Sample(self.values[keep], self.weights[keep], self.link, tuple(self.ids[i] for i in keep))


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference ``a - b`` of two values.

    Attributes:
        value: The difference on the common examples.
        ci95: Paired bootstrap interval; None when it has no spread.
        p: Two-sided paired permutation p; None below two examples.
        n: Common examples.
        clear: The interval excludes 0 and p is at most 0.05.
    """

    value: float
    ci95: Interval | None
    p: float | None
    n: int
    clear: bool


def draws(sample: Sample, *, seed: int, resamples: int = RESAMPLES) -> Array:
    """[resamples] bootstrap draws of the sample's value; the sample must not be empty."""
    n = sample.n
    rng = np.random.default_rng([seed, n])
    total, weight = sample.weights * sample.values, sample.weights
    means = np.empty(resamples)
    for start, stop in _blocks(resamples, n):
        index = rng.integers(0, n, size=(stop - start, n))
        means[start:stop] = total[index].sum(axis=1) / weight[index].sum(axis=1)
    return _linked(means, sample.link)


class Bootstrap:
    """Draws by sample, each made once: paired statistics reuse them."""

    def __init__(self, seed: int, resamples: int = RESAMPLES) -> None:
        self.seed = seed
        self.resamples = resamples
        self._made: dict[Sample, Array] = {}

    def __call__(self, sample: Sample) -> Array:
        """[resamples] draws of the sample's value."""
        if sample not in self._made:
            self._made[sample] = draws(sample, seed=self.seed, resamples=self.resamples)
        return self._made[sample]


def bounds(values: Array) -> Interval:
    """The central 95 % of draws as order statistics, which tolerate infinite draws outside them."""
    low, high = np.quantile(values, _TAILS, method="inverted_cdf")
    return float(low), float(high)


def interval(values: Array, *, scale: float = 0.0) -> Interval | None:
    """:func:`bounds`, or None when they are not finite or all draws are one value (no spread was observed).

    ``scale`` is the size of the numbers the draws were computed from, when that is more than the draws themselves.
    """
    if np.isnan(values).any():
        return None
    low, high = bounds(values)
    if not np.isfinite([low, high]).all():
        return None
    spread = float(values.max() - values.min())
    return (low, high) if spread > _SAME * max(abs(low), abs(high), scale) else None


def score_interval(sample: Sample, bootstrap: Bootstrap, *, unit: str) -> Interval | None:
    """95 % interval of a sample's value: the bootstrap's, or the exact one where all scores are at one end of 0 to 100.

    None for a single example, and where the bootstrap observed no spread (see :func:`interval`).
    """
    if sample.n < 2:
        return None
    return _at_an_end(sample) if unit == _BOUNDED and _is_plain(sample) else interval(bootstrap(sample))


def _is_plain(sample: Sample) -> bool:
    """Whether all examples have one score, 0 or 100, and count the same."""
    same = sample.link == "identity" and bool((sample.weights == sample.weights[0]).all())
    return same and sample.values[0] in (0.0, 100.0) and bool((sample.values == sample.values[0]).all())


def _at_an_end(sample: Sample) -> Interval:
    arm = 100.0 * (1.0 - _TAILS[0] ** (1.0 / sample.n))
    return (0.0, arm) if sample.values[0] == 0.0 else (100.0 - arm, 100.0)


def paired(*samples: Sample) -> tuple[Sample, ...]:
    """The samples cut to their common ids; empty samples when there are none or one sample is anonymous."""
    common = frozenset.intersection(*(frozenset(sample.ids) for sample in samples))
    return tuple(sample.only(common) for sample in samples)


def difference(a: Sample, b: Sample, bootstrap: Bootstrap) -> Difference | None:
    """Paired difference of values; None when the samples have no example in common or a value is infinite."""
    a, b = paired(a, b)
    value = a.value - b.value
    if not np.isfinite(value):
        return None
    with np.errstate(invalid="ignore"):
        delta = bootstrap(a) - bootstrap(b)
    p = swap_test(a, b, seed=bootstrap.seed) if a.n > 1 else None
    low, high = bounds(delta) if np.isfinite(delta).all() else (-np.inf, np.inf)
    clear = p is not None and p <= ALPHA and (low > 0 or high < 0)
    return Difference(value, interval(delta, scale=max(abs(a.value), abs(b.value))), p, a.n, clear)


def swap_test(a: Sample, b: Sample, *, seed: int, permutations: int = PERMUTATIONS) -> float:
    """Two-sided p of the paired permutation test described at the top of this module.

    Both samples hold the same ids in the same order (see :func:`paired`) and at least one example.
    """
    sums_a = np.stack([a.weights * a.values, a.weights], axis=1)
    sums_b = np.stack([b.weights * b.values, b.weights], axis=1)
    total, change = sums_a.sum(axis=0) + sums_b.sum(axis=0), sums_b - sums_a
    observed = abs(a.mean - b.mean)
    # Swaps that give the observed difference again must count as such despite another order of summation.
    # Of the weighted sums: one large value of next to no weight must not make all permutations alike.
    slack = 1e-10 * max(float(np.abs(sums[:, 0]).sum() / sums[:, 1].sum()) for sums in (sums_a, sums_b))
    rng = np.random.default_rng([seed, a.n, 1])
    extreme = 0
    for start, stop in _blocks(permutations, a.n):
        new_a = sums_a.sum(axis=0) + _coins(rng, stop - start, a.n) @ change
        new_b = total - new_a
        t = new_a[:, 0] / new_a[:, 1] - new_b[:, 0] / new_b[:, 1]
        extreme += int((np.abs(t) >= observed - slack).sum())
    return (1 + extreme) / (1 + permutations)


def ratio(numerator: Array, denominator: Array) -> Array:
    """Draws of a ratio whose denominator is meant to be positive.

    A draw with a denominator at or below zero is the limit of a denominator that shrinks to zero: plus or minus
    infinity by the numerator's sign. That widens the interval, as it should, where plain division would flip the sign.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        limit = np.where(numerator == 0, 0.0, np.sign(numerator) * np.inf)
        return np.where(denominator > 0, numerator / denominator, limit)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: bounds the chance of any false difference among all of them (Holm 1979)."""
    count = len(p_values)
    adjusted = [1.0] * count
    running = 0.0
    for rank, index in enumerate(sorted(range(count), key=p_values.__getitem__)):
        running = max(running, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _by_id(x: Array, w: Array, ids: Sequence[str]) -> tuple[Array, Array, tuple[str, ...]]:
    """Values, weights and ids with one entry per id, sorted by id."""
    names = sorted(set(ids))
    place = {name: index for index, name in enumerate(names)}
    where = np.array([place[name] for name in ids], dtype=np.intp)
    answers, weight = np.bincount(where), np.bincount(where, weights=w)
    total = np.bincount(where, weights=w * x)
    single = np.zeros(len(names))
    single[where] = x
    # An example with one answer keeps its value to the last digit, and an example without weight has none.
    merged = np.divide(total, weight, out=np.zeros(len(names)), where=weight > 0)
    return np.where(answers == 1, single, merged), weight / answers, tuple(names)


def _linked(means: Array, link: str) -> Array:
    if link == "identity":
        return means
    with np.errstate(over="ignore"):
        return np.exp(means)


def _blocks(rows: int, n: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // max(n, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _coins(rng: np.random.Generator, rows: int, n: int) -> Array:
    """[rows, n] fair coins, 0.0 or 1.0."""
    packed = rng.integers(0, 256, size=(rows, (n + 7) // 8), dtype=np.uint8)
    return np.unpackbits(packed, axis=1, count=n).astype(np.float64)

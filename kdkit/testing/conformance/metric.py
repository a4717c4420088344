"""Is a metric a function of the answers alone, and can its value be resampled?

Subclass :class:`MetricConformance` in a test file and run pytest:

    class TestPoliteness(MetricConformance):
        range = (0.0, 100.0)

        def build(self):
            return Politeness()
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Final

from kdkit.api.data import Example, MetricResult, Prediction
from kdkit.api.errors import DataError
from kdkit.api.protocols import Metric
from kdkit.testing.conformance.checks import one_line
from kdkit.testing.conformance.reward import random_texts
from kdkit.testing.hostile import hostile_completions

__all__ = ["MetricConformance"]

_TEXTS: Final = (
    ("What is 2 + 2?", "4", "4"),
    ("What is 3 + 3?", "It is six.", "6"),
    ("Name a bird.", "An owl", "An owl or a wren"),
    ("Name a fish.", "a cod", "A cod."),
    ("Repeat: naïve café", "naïve", "naïve café"),
    ("Say nothing.", "", "nothing"),
    ("Write a function.", "def f(x):\n    return x", "def f(x):\n    return x + 1"),
    ("Count.", "one two three one two", "one two three"),
)


class MetricConformance:
    """What every metric must fulfil.

    Attributes:
        range: Values of the metric lie in it.
        tolerance: How far two calls on the same answers may differ, relative to the largest of value and 1.
        corpus: It is a metric of all answers together, such as BLEU, which may have no values per example; its
            interval, if it has one, is then its own (``ci95``).
    """

    range: ClassVar[tuple[float, float]]
    tolerance: ClassVar[float] = 1e-9
    corpus: ClassVar[bool] = False

    def build(self) -> Metric:
        """The metric under test."""
        raise NotImplementedError

    def predictions(self) -> Sequence[Prediction]:
        """Six or more answers to different prompts that the metric can score, not all with the same value.

        By default short texts with a reference each. Give your own for metrics that read verdicts, measures or traces.
        """
        return [
            Prediction(prompt, text, (reference,), id=f"row-{index}")
            for index, (prompt, text, reference) in enumerate(_TEXTS)
        ]

    # -- helpers

    def _score(self, predictions: Sequence[Prediction]) -> MetricResult:
        return self.build().score(predictions)

    def _valid(self, result: MetricResult, predictions: Sequence[Prediction], what: str) -> None:
        assert isinstance(result, MetricResult), f"{what}: {type(result).__name__} is no MetricResult"
        low, high = self.range
        assert math.isfinite(result.value), f"{what}: the value is {result.value}"
        assert low <= result.value <= high, f"{what}: the value {result.value} is outside {low} to {high}"
        assert 0 < result.n <= len(predictions), f"{what}: n is {result.n}, of {len(predictions)} predictions"
        for reason, number in result.counts.items():
            assert reason, f"{what}: a count without words"
            assert number > 0, f"{what}: the count {reason!r} is {number}; only what occurred is listed"
        if self.corpus and not result.per_example:
            self._valid_corpus(result, what)
        else:
            self._valid_examples(result, predictions, what)

    def _valid_corpus(self, result: MetricResult, what: str) -> None:
        assert not result.ids, f"{what}: ids, of a metric without values per example"
        if result.ci95 is not None:
            low, high = result.ci95
            assert low <= high, f"{what}: the interval is {low} to {high}"
            assert self.range[0] <= low, f"{what}: the interval begins at {low}, outside {self.range}"
            assert high <= self.range[1], f"{what}: the interval ends at {high}, outside {self.range}"

    def _valid_examples(self, result: MetricResult, predictions: Sequence[Prediction], what: str) -> None:
        assert result.ci95 is None, f"{what}: an interval of its own, where one is made from the examples"
        known = {prediction.id for prediction in predictions}
        ids = result.ids or [prediction.id for prediction in predictions]
        assert result.n == len(result.per_example), f"{what}: n is {result.n}, of {len(result.per_example)} values"
        assert result.n == len(ids), f"{what}: n is {result.n}, of {len(ids)} ids"
        assert set(ids) <= known, f"{what}: ids that no prediction has: {sorted(set(ids) - known)}"
        assert all(map(math.isfinite, result.per_example)), f"{what}: a value of an example is not finite"

    def _same(self, got: float, wanted: float, what: str) -> None:
        gap = abs(got - wanted)
        assert gap <= self.tolerance * max(1.0, abs(wanted)), f"{what}: the value is {got}, not {wanted}"

    def _by_id(self, result: MetricResult, predictions: Sequence[Prediction]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        ids = result.ids or [prediction.id for prediction in predictions]
        for name, value in zip(ids, result.per_example, strict=True):
            found.setdefault(name, []).append(value)
        return {name: sorted(values) for name, values in found.items()}

    # -- the contract

    def test_your_predictions_tell_something(self) -> None:
        predictions = self.predictions()
        assert len(predictions) >= 6, "give six predictions or more"
        if self.corpus:
            values = {self._score([prediction]).value for prediction in predictions}
        else:
            values = set(self._score(predictions).per_example)
        assert len(values) >= 2, "all of your predictions have the same value"

    def test_a_result_is_whole(self) -> None:
        """Value in range, one finite value per scored prediction, ids that are known, counts that occurred."""
        predictions = self.predictions()
        for some in (predictions, predictions[: len(predictions) // 2], predictions[:1]):
            self._valid(self._score(some), some, f"{len(some)} predictions")

    def test_the_value_is_the_mean_of_the_examples(self) -> None:
        """Weighted, and through the link: what intervals are resampled from must be what the table shows."""
        result = self._score(self.predictions())
        if self.corpus and not result.per_example:
            return
        weights = (1.0,) * result.n if result.weights is None else result.weights
        assert len(weights) == result.n, f"{len(weights)} weights for {result.n} examples"
        assert all(math.isfinite(weight) and weight >= 0 for weight in weights), "a weight is no number of 0 or more"
        mean = math.fsum(w * x for w, x in zip(weights, result.per_example, strict=True)) / math.fsum(weights)
        wanted = math.exp(mean) if result.link == "exp" else mean
        gap = abs(result.value - wanted)
        assert gap <= 1e-6 * max(1.0, abs(wanted)), f"the value is {result.value}, the mean of the examples {wanted}"

    def test_the_same_twice_and_from_another_instance(self) -> None:
        predictions, metric = self.predictions(), self.build()
        random.seed(10)
        first = metric.score(predictions)
        random.seed(11)
        self._same(metric.score(predictions).value, first.value, "a second call")
        metric.score(predictions[:2])
        self._same(metric.score(predictions).value, first.value, "after another call")
        self._same(self._score(predictions).value, first.value, "another instance")

    def test_the_order_does_not_matter(self) -> None:
        predictions = list(self.predictions())
        first = self._score(predictions)
        for seed in range(3):
            shuffled = list(predictions)
            random.Random(seed).shuffle(shuffled)  # noqa: S311 - an order for tests
            got = self._score(shuffled)
            self._same(got.value, first.value, "in another order")
            if self.corpus:
                continue
            now, before = self._by_id(got, shuffled), self._by_id(first, predictions)
            assert now.keys() == before.keys(), "in another order, other examples are scored"
            for name, values in before.items():
                for mine, its in zip(now[name], values, strict=True):
                    self._same(mine, its, f"in another order, example {name}")

    def test_every_row_twice_has_the_same_value(self) -> None:
        """The value is a mean: rows that are there twice, as other examples, change nothing."""
        predictions = list(self.predictions())
        again = [replace(prediction, id=f"{prediction.id}-again") for prediction in predictions]
        once, twice = self._score(predictions), self._score([*predictions, *again])
        self._same(twice.value, once.value, "every row twice")
        assert twice.n == 2 * once.n, f"every row twice: n is {twice.n}, not twice {once.n}"

    def test_the_predictions_stay_as_they_are(self) -> None:
        predictions = [replace(prediction, extra=dict(prediction.extra)) for prediction in self.predictions()]
        kept = copy.deepcopy(predictions)
        self._score(predictions)
        assert predictions == kept, "a prediction was changed"

    def test_no_predictions_are_undefined(self) -> None:
        """A ``DataError`` of one line, or n = 0; a value would be made up."""
        try:
            result = self._score([])
        except DataError as error:
            one_line(error, "no predictions")
        else:
            assert result.n == 0, f"no predictions have the value {result.value} with n = {result.n}"

    def test_no_answer_makes_it_raise(self) -> None:
        """Trivial and hostile answers have a value or none (``DataError``); nothing else is raised."""
        given = self.predictions()[0]
        example = Example(id="x", prompt=given.prompt, references=tuple(given.references))
        texts = ["", " ", "\n", given.prompt, *(item.text for item in hostile_completions(example, given.prompt))]
        for text in (*texts, *random_texts(40, seed=17)):
            self._tried([replace(given, text=text)], text)

    def test_missing_parts_make_it_raise_nothing_else(self) -> None:
        """Rows without references, verdicts, measures and traces, or with a text cut off."""
        for prediction in self.predictions():
            bare = Prediction(prediction.prompt, prediction.text, (), id=prediction.id)
            for row in (bare, replace(prediction, references=("",)), replace(prediction, truncated=True)):
                self._tried([row], row.text)

    def _tried(self, predictions: Sequence[Prediction], text: str) -> None:
        try:
            result = self._score(predictions)
        except DataError as error:
            one_line(error, f"the answer {text[:60]!r}")
        else:
            if result.n:
                self._valid(result, predictions, f"the answer {text[:60]!r}")

"""Metrics of all answers together: a number with an interval of its own, and nothing to compare by example."""

from __future__ import annotations

import numpy as np
import pytest
from made_up_scores import metric, model

from kdkit.report.collect import collect
from kdkit.report.resampling import corpus_interval


def whole(value: float, **more):
    return {**metric([]), "value": value, "n": 40, "unit": "", **more}


def report(directory):
    return collect([directory], recipe="r", seed=1)


def two(first, second):
    return {name: model({"d": {"bleu": entry}}) for name, entry in (("base", first), ("kd", second))}


def test_an_interval_of_its_own_is_shown_and_nothing_is_compared(write) -> None:
    found = report(write(two(whole(12.0, ci95=[10.0, 14.0]), whole(20.0, ci95=[18.0, 22.0]))))
    assert found["models"]["kd"]["metrics"]["bleu"] == {
        "value": 20.0, "n": 40, "ci95": [18.0, 22.0], "higher_is_better": True, "unit": "",
    }  # fmt: skip
    assert found["pairs"] == found["gap_closed"] == found["retention"] == []
    assert any(note.startswith("no per-example scores, so no comparison: bleu of base") for note in found["notes"])


def test_without_an_interval_the_note_says_so(write) -> None:
    found = report(write(two(whole(12.0), whole(20.0))))
    assert found["models"]["kd"]["metrics"]["bleu"]["ci95"] is None
    assert any(note.startswith("no per-example scores, so neither interval nor") for note in found["notes"])


@pytest.mark.parametrize(("of_tokens", "pairs"), [(True, 0), (False, 1)])
def test_numbers_per_word_are_compared_between_vocabularies(write, of_tokens, pairs) -> None:
    rng = np.random.default_rng(0)
    models = {
        name: model(
            {"d": {"word-perplexity": {**metric(rng.random(30), weights=[3.0] * 30), "of_tokens": of_tokens}}},
            vocabulary=name,
        )
        for name in ("base", "kd")
    }
    found = report(write(models))
    assert len(found["pairs"]) == pairs
    assert any("different tokens" in note for note in found["notes"]) == of_tokens


def test_the_interval_of_a_mean_is_that_of_a_bootstrap() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    low, high = corpus_interval(lambda places: float(values[places].mean()), list(map(str, range(400))), resamples=2000)
    assert (low, high) == pytest.approx((values.mean() - 0.196, values.mean() + 0.196), abs=0.03)


def test_all_answers_to_an_example_are_drawn_together() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 100)
    ids = list(map(str, range(100)))
    once = corpus_interval(lambda places: float(values[places].mean()), ids, resamples=200)
    many = np.concatenate([values - 1.0, values, values + 1.0])

    def score(places: list[int]) -> float:
        assert len(places) == 300
        return float(many[places].mean())

    assert corpus_interval(score, ids * 3, resamples=200) == pytest.approx(once)


def test_where_there_is_no_interval() -> None:
    mean = np.array([1.0, 2.0, 3.0])
    ids = ["a", "b", "c"]
    assert corpus_interval(lambda places: float(mean[places].mean()), ids, resamples=0) is None
    assert corpus_interval(lambda places: float(mean[places].mean()), ["a"] * 3, resamples=9) is None
    assert corpus_interval(lambda places: 4.0, ids, resamples=9) is None
    assert corpus_interval(lambda places: float("nan"), ids, resamples=9) is None

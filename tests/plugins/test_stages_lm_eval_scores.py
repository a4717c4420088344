"""From what the harness says of every example to scores: without a model. Needs the harness (extra: lm-eval)."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api import metrics as theirs

from kdkit.plugins.stages.lm_eval_scores import collected


class Adds:
    """A task that adds up its metrics in some way."""

    def __init__(self, higher=True, **how):
        self.how, self.higher = how, higher

    def aggregation(self):
        return self.how

    def higher_is_better(self):
        return dict.fromkeys(self.how, self.higher)


def logged(metric, *values):
    """What the harness says of examples."""
    plain = {"target": "", "filtered_resps": [], "filter": "none", "metrics": [metric]}
    return [{"doc_id": place, metric: value, **plain} for place, value in enumerate(values)]


@pytest.mark.parametrize(
    ("metric", "how", "values", "expected"),
    [
        ("acc", "mean", (1.0, 0.0, 1.0, 1.0), {"value": 75.0, "unit": "0-100", "n": 4}),
        ("f1", "mean", (0.5, 0.0), {"value": 0.25, "unit": "", "n": 2}),
        ("score", "nanmean", (1.0, math.nan, 0.5), {"value": 0.75, "n": 2, "ids": ["0", "2"]}),
        ("perplexity", "perplexity", (-1.0, -3.0), {"value": math.exp(2.0), "per_example": [1.0, 3.0]}),
        (
            "word_perplexity",
            "weighted_perplexity",
            ((-2.0, 1), (-3.0, 3)),
            {"value": math.exp(5 / 4), "per_example": [2.0, 1.0], "of_tokens": False},
        ),
        (
            "bits_per_byte",
            "bits_per_byte",
            ((-2.0 * math.log(2.0), 1), (0.0, 3)),
            {"value": 0.5, "per_example": [2.0, 0.0], "of_tokens": False},
        ),
    ],
)
def test_metrics_are_added_up_as_the_harness_does(metric, how, values, expected):
    aggregate = getattr(theirs, how)
    found = collected({"task": Adds(**{metric: aggregate})}, {"task": logged(metric, *values)}, resamples=0)
    (entry,) = found.metrics.values()
    for key, value in expected.items():
        assert entry[key] == (value if key in {"unit", "ids"} else pytest.approx(value)), key
    scale = 100.0 if expected.get("unit") else 1.0
    assert entry["value"] == pytest.approx(scale * aggregate(list(values)))


@pytest.mark.parametrize("other", [Adds(score=max), Adds(higher=False, score=min)])
def test_tasks_of_a_group_that_add_up_differently_are_left_out(other):
    found = collected(
        {"a": Adds(score=min), "b": other}, {"a": logged("score", 1.0), "b": logged("score", 2.0)}, resamples=0
    )
    assert found.metrics == {}
    assert found.notes == ["score is left out: its tasks do not add it up in the same way"]

from __future__ import annotations

from typing import ClassVar

import pytest
from kdkit.api import Metric, Prediction
from kdkit.testing.conformance import MetricConformance

from kdkit_acme import plugin

(SPEC,) = plugin.kdkit_metrics()


class TestMetric(MetricConformance):
    range: ClassVar[tuple[float, float]] = (0.0, 100.0)

    def build(self) -> Metric:
        metric: Metric = SPEC.build(SPEC.params())
        return metric


@pytest.mark.parametrize(
    ("text", "ignore_case", "value"),
    [("Paris", True, 100.0), (" paris\n", True, 100.0), ("paris", False, 0.0), ("Rome", True, 0.0)],
)
def test_values(text: str, ignore_case: bool, value: float) -> None:
    metric = SPEC.build(SPEC.params(ignore_case=ignore_case))
    rows = [Prediction("Capital of France?", text, ("PARIS", "Paris")), Prediction("?", "?", ())]
    result = metric.score(rows)
    assert (result.value, result.n) == (value, 1)
    assert result.counts == {"predictions without references": 1}


def test_the_way_it_counts_is_in_its_key() -> None:
    assert SPEC.key is not None
    assert SPEC.key(SPEC.params()) != SPEC.key(SPEC.params(ignore_case=False))

"""What kdkit reads of this package. Keep it light: what lists or checks components imports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdkit.api import MetricSpec, Params, hookimpl

if TYPE_CHECKING:
    from kdkit.api import Metric


class AcmeParams(Params):
    """Answers that equal one of their references."""

    ignore_case: bool = True
    """Upper and lower case are the same."""


def _build(params: AcmeParams) -> Metric:
    from kdkit_acme import metric

    return metric.AcmeMetric(ignore_case=params.ignore_case)


def _key(params: AcmeParams) -> str:
    """Numbers that were made in different ways never share a column of a report."""
    name = "acme"
    return name if params.ignore_case else f"{name}-case"


@hookimpl
def kdkit_metrics() -> Iterator[MetricSpec[Any]]:
    """The metrics of this package."""
    yield MetricSpec(
        name="acme",
        summary="Share of answers that equal one of their references",
        params=AcmeParams,
        build=_build,
        key=_key,
        higher_is_better=True,
        needs=frozenset({"completion", "reference"}),
        unit="0-100",
    )

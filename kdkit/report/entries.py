"""How ``report.json`` is read by everything that shows a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from kdkit.report import ALPHA

__all__ = ["SAME", "Report", "bare", "by_dataset", "marks_of", "metrics_of", "quantization"]

Report = Mapping[str, Any]

SAME: Final = "no significant difference"


def metrics_of(report: Report) -> dict[str, Mapping[str, Any]]:
    """Metric to the first model's entry, in the order of the report."""
    found: dict[str, Mapping[str, Any]] = {}
    for model in report["models"].values():
        for key, entry in model["metrics"].items():
            found.setdefault(key, entry)
    return found


def by_dataset(report: Report) -> dict[str, list[str]]:
    """Dataset to its metric keys; the one dataset of a report is called ``""``, as keys do not name it."""
    found: dict[str, list[str]] = {}
    for key in metrics_of(report):
        fitting = [name for name in report["datasets"] if len(report["datasets"]) > 1 and key.startswith(f"{name}/")]
        found.setdefault(max(fitting, key=len, default=""), []).append(key)
    return found


def bare(key: str, dataset: str) -> str:
    """The metric's key without the dataset that it names."""
    return key.removeprefix(f"{dataset}/") if dataset else key


def marks_of(report: Report) -> Iterator[tuple[tuple[str, str], str]]:
    """``(model, metric)`` to its mark against the reference."""
    reference, metrics = report["roles"]["reference"], metrics_of(report)
    for row in report["pairs"]:
        if reference not in (row["a"], row["b"]) or row["p_holm"] is None:
            continue
        other = row["b"] if row["a"] == reference else row["a"]
        delta = row["difference"] if other == row["a"] else -row["difference"]
        if row["p_holm"] > ALPHA:
            mark = "(=)"
        else:
            mark = "(+)" if (delta > 0) == metrics[row["metric"]]["higher_is_better"] else "(-)"
        yield (other, row["metric"]), mark


def quantization(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a model's quantizer says; None for a model that is not quantised, or a report of an earlier version."""
    facts: Mapping[str, Any] | None = model.get("quantization")
    return facts

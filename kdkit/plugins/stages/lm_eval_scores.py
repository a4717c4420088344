"""From what the lm-evaluation-harness says of every example to entries of ``scores.json``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from lm_eval.api import metrics as theirs

from kdkit.api.data import MetricResult
from kdkit.plugins.stages.results import entry_of
from kdkit.report.resampling import corpus_interval

__all__ = ["Collected", "collected"]

Aggregate: TypeAlias = Callable[[Sequence[Any]], float]

_SHARES: Final = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"})
"""Right or wrong: given as 0 to 100, as everywhere in kdkit, and not as 0 to 1."""
_NO_METRIC: Final = "bypass"
_NO_FILTER: Final = "none"
_KEPT: Final = ("doc_id", "target", "filtered_resps", "filter")


@dataclass(slots=True)
class Collected:
    """One model's results on one dataset.

    Attributes:
        metrics: Entries of ``scores.json`` by key.
        categories: The task of every example, by its id; empty texts where there is only one task.
        samples: What is worth looking at, one mapping per example and filter.
        notes: What a reader has to know.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    categories: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Metric:
    """A metric's values over all tasks that have it."""

    ids: list[str] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    aggregates: list[Aggregate] = field(default_factory=list)
    higher: set[bool | None] = field(default_factory=set)


def collected(tasks: Mapping[str, Any], samples: Mapping[str, Sequence[Any]], *, resamples: int) -> Collected:
    """Results of a task, or of all tasks of a group together.

    Args:
        tasks: The harness's tasks by name.
        samples: What it logged of them, by name.
        resamples: For intervals of metrics that have no values per example.
    """
    found = Collected()
    metrics: dict[tuple[str, str], _Metric] = defaultdict(_Metric)
    for name, task in tasks.items():
        aggregation, higher = task.aggregation(), task.higher_is_better()
        for sample in samples[name]:
            place = f"{name}/{sample['doc_id']}" if len(tasks) > 1 else str(sample["doc_id"])
            found.categories[place] = name if len(tasks) > 1 else ""
            values = {metric: sample[metric] for metric in sample["metrics"] if metric != _NO_METRIC}
            found.samples.append({"task": name, **{key: sample[key] for key in _KEPT}, **values})
            for metric, value in values.items():
                entry = metrics[metric, sample["filter"]]
                entry.ids.append(place)
                entry.items.append(value)
                aggregate = aggregation.get(metric, theirs.mean)
                if aggregate not in entry.aggregates:
                    entry.aggregates.append(aggregate)
                entry.higher.add(higher.get(metric))
    for (metric, filtered), values in metrics.items():
        key = _key(metric, filtered)
        if len(values.aggregates) > 1 or len(values.higher) > 1:
            found.notes.append(f"{key} is left out: its tasks do not add it up in the same way")
            continue
        found.metrics[key] = _entry(metric, values, resamples)
    return found


def _key(metric: str, filtered: str) -> str:
    """``exact-match``, or ``exact-match-flexible-extract`` where the task reads answers in several ways."""
    name = metric if filtered == _NO_FILTER else f"{metric}-{filtered}"
    return "".join(char if char.isascii() and char.isalnum() else "-" for char in name.lower()).strip("-")


def _entry(metric: str, values: _Metric, resamples: int) -> dict[str, Any]:
    (aggregate,) = values.aggregates
    (higher,) = values.higher
    ids, unit, extra = values.ids, "", {}
    if aggregate in (theirs.mean, theirs.nanmean):
        kept = [(name, float(item)) for name, item in zip(ids, values.items, strict=True)]
        if aggregate is theirs.nanmean:
            kept = [(name, value) for name, value in kept if not math.isnan(value)]
        scale, unit = (100.0, "0-100") if metric in _SHARES else (1.0, "")
        ids = [name for name, _ in kept]
        result = _mean([scale * value for _, value in kept])
    elif aggregate is theirs.perplexity:
        result = _mean([-float(item) for item in values.items], link="exp")
    elif aggregate in (theirs.weighted_perplexity, theirs.bits_per_byte):
        result, extra = _weighted(values.items, bits=aggregate is theirs.bits_per_byte), {"of_tokens": False}
    else:
        result, ids = _whole(aggregate, values, resamples), []
    return {**entry_of(result, higher_is_better=higher, unit=unit), "ids": ids, **extra}


def _mean(values: Sequence[float], link: Any = "identity") -> MetricResult:
    mean = math.fsum(values) / len(values) if values else math.nan
    value = math.exp(mean) if link == "exp" else mean
    return MetricResult(value=value, per_example=tuple(values), n=len(values), link=link)


def _weighted(items: Sequence[tuple[float, float]], *, bits: bool) -> MetricResult:
    """Log-likelihoods of texts and their lengths in words or bytes: per word or byte, the long text counts more."""
    lengths = tuple(float(length) for _, length in items)
    nats = math.log(2.0) if bits else 1.0
    rates = tuple(
        -float(item) / length / nats if length else 0.0 for (item, _), length in zip(items, lengths, strict=True)
    )
    mean = math.fsum(rate * length for rate, length in zip(rates, lengths, strict=True)) / math.fsum(lengths)
    return MetricResult(
        value=mean if bits else math.exp(mean),
        per_example=rates,
        n=len(items),
        weights=lengths,
        link="identity" if bits else "exp",
    )


def _whole(aggregate: Aggregate, values: _Metric, resamples: int) -> MetricResult:
    """A metric of all answers together, such as BLEU."""

    def score(indices: list[int]) -> float:
        return float(aggregate([values.items[index] for index in indices]))

    everything = list(range(len(values.items)))
    ci95 = corpus_interval(score, values.ids, resamples=resamples)
    return MetricResult(value=score(everything), per_example=(), n=len(everything), ci95=ci95)

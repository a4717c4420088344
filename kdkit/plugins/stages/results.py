"""From answers to predictions, from predictions to ``scores.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kdkit.api.data import Completion, Example, MetricResult, Prediction
from kdkit.api.errors import DataError, KdkitError, StageError
from kdkit.plugins.stages.baselines import baseline_predictions
from kdkit.plugins.stages.forced import Forced
from kdkit.plugins.stages.slots import metric_key, metric_needs, needs_reference

if TYPE_CHECKING:
    from kdkit.api import Component, Metric, StageContext
    from kdkit.train.scoring import ExampleScore

__all__ = ["Answered", "Results", "entry_of"]

_PER_ROW: Final = frozenset({"nll", "teacher-kl", "exposure", "student-kl"})
"""Needs that are measured once per row, whatever number of answers it has."""
_BREAKS: Final = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What code raises on values that it was not written for; a full disk, say, is none of it."""


@dataclass(slots=True)
class Answered:
    """Everything that one model gave on one dataset.

    Attributes:
        prompts: Prompt text of every row.
        completions: Row by row, the samples of a row together; empty when nothing was decoded.
        verdicts: One per completion; empty without a judge.
        forced: Teacher-forced measures.
        rewards: Entries of ``scores.json`` that the rewards of the stage gave.
    """

    prompts: Sequence[str] = ()
    completions: Sequence[Completion] = ()
    verdicts: Sequence[bool | None] = ()
    forced: Forced = field(default_factory=Forced)
    rewards: Mapping[str, Any] = field(default_factory=dict)

    def predictions(self, rows: Sequence[Example]) -> list[Prediction]:
        """One per completion, or one per row when nothing was decoded.

        Measures and traces belong to a row, not to an answer: they stand at its first sample, so that a mean over
        tokens counts each row once.
        """
        samples = max(1, len(self.completions) // len(rows))
        return [
            self._prediction(row, place, place * samples + sample, sample)
            for place, row in enumerate(rows)
            for sample in range(samples)
        ]

    def counts(self, rows: int) -> dict[str, int]:
        """Rows, answers, and answers that are cut off, empty, or could not be judged."""
        return {
            "n": rows,
            "answers": len(self.completions),
            "truncated": sum(answer.truncated for answer in self.completions),
            "empty": sum(not answer.text.strip() for answer in self.completions),
            "unjudged": sum(verdict is None for verdict in self.verdicts),
        }

    def _prediction(self, row: Example, place: int, index: int, sample: int) -> Prediction:
        answer = self.completions[index] if self.completions else None
        first = sample == 0
        return Prediction(
            prompt=self.prompts[place],
            text=answer.text if answer else "",
            references=row.targets,
            id=row.id,
            category=row.category,
            truncated=bool(answer and answer.truncated),
            sample=sample,
            verdict=self.verdicts[index] if self.verdicts else None,
            measures=_measures(self.forced.scores.get(row.id)) if first else {},
            traces=self.forced.traces.get(row.id, {}) if first else {},
            extra=row.extra,
        )


class Results:
    """Scores predictions with all metrics and keeps the predictions.

    Args:
        metrics: The recipe's metrics; each is built once.
        ctx: The stage's context.
        directory: Where predictions go.
    """

    def __init__(self, metrics: Sequence[Component[Metric]], ctx: StageContext, directory: Path) -> None:
        self._metrics = {metric_key(metric): (metric, ctx.build(metric)) for metric in metrics}
        self._directory, self._log = directory, ctx.log
        directory.mkdir(parents=True, exist_ok=True)

    def score(self, predictions: Sequence[Prediction], about: str) -> dict[str, Any]:
        """Metric key to result. A metric of teacher-forced measures sees the first sample of every row only.

        Where a metric is undefined (it raises ``DataError``, or scored nothing), its entry is null with the reason: the
        other numbers are worth having.

        Raises:
            StageError: A metric's result is malformed.
        """
        rows = [prediction for prediction in predictions if prediction.sample == 0]
        found: dict[str, Any] = {}
        for key, pair in self._metrics.items():
            if needs_reference(pair[0]) and not predictions[0].references:
                continue
            try:
                found[key] = _result(key, pair, rows if metric_needs(pair[0]) & _PER_ROW else predictions)
            except DataError as error:
                found[key] = _undefined(pair[0], f"{error.where}: {error.what}" if error.where else error.what)
            if "reason" in found[key]:
                self._log(f"{about}: {key} is undefined: {found[key]['reason']}")
        return found

    def baselines(self, data: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
        """Baseline to ``{"results": {DATASET: {KEY: ...}}}``, for metrics that compare the answer's text only."""
        texts = {"completion", "reference"}
        chosen = {key: pair for key, pair in self._metrics.items() if metric_needs(pair[0]) <= texts}
        found: dict[str, Any] = {}
        for dataset, rows in data.items() if chosen else ():
            for name, predictions in baseline_predictions(rows).items():
                self.write(f"baseline-{name}", dataset, predictions)
                entry = found.setdefault(name, {"results": {}})["results"].setdefault(dataset, {})
                for key, pair in chosen.items():
                    if needs_reference(pair[0]) and not rows[0].targets:
                        continue
                    result = self._trivial(key, pair, predictions, f"{dataset}: the {name} baseline has no {key}")
                    if result is not None:
                        entry[key] = result
        return found

    def _trivial(
        self, key: str, pair: tuple[Component[Metric], Metric], predictions: Sequence[Prediction], none: str
    ) -> dict[str, Any] | None:
        """A baseline's result; None, and ``none`` is logged with the reason, when there is none.

        A metric may be undefined for such answers (distinct words of nothing), and one from elsewhere may break on
        them. Neither is worth an evaluation that the models got through.
        """
        try:
            result = _result(key, pair, predictions)
        except KdkitError as error:
            reason = error.what
        except _BREAKS as error:
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = result.get("reason", "")
        if reason:
            self._log(f"{none}: {reason}")
        return None if reason else result

    def write(self, name: str, dataset: str, predictions: Sequence[Prediction]) -> None:
        """Write one predictions file: one JSON object a line, without the example's extra columns."""
        file = self._directory / f"{name}--{dataset}.jsonl"
        # A lone surrogate in a text becomes its JSON escape.
        with file.open("w", encoding="utf-8", errors="backslashreplace") as out:
            for prediction in predictions:
                # The tests of one programming problem can take megabytes, for every answer of every model.
                slim = asdict(replace(prediction, extra={}))
                # What a model that diverged measures is no number; its metrics say so.
                slim["measures"] = {key: _finite(value) for key, value in slim["measures"].items()}
                slim["traces"] = {key: [_finite(value) for value in trace] for key, trace in slim["traces"].items()}
                out.write(json.dumps(slim, ensure_ascii=False, allow_nan=False) + "\n")


def _result(key: str, pair: tuple[Component[Metric], Metric], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The entry of ``scores.json``; numbers of any kind (NumPy's too) as Python's, null for those that are not finite.

    Raises:
        DataError: The metric is undefined for these predictions.
        StageError: Its result is malformed; the error names the metric.
    """
    component, metric = pair
    result: MetricResult = metric.score(predictions)
    if result.n == 0:
        return _undefined(component, "no answer was scored", result.counts)
    ids = result.ids or tuple(prediction.id for prediction in predictions)
    whole = not result.per_example and not result.ids
    if whole:
        ids = ()
    elif len(result.per_example) != result.n or (result.ids and len(ids) != result.n):
        raise StageError("per_example, ids and n disagree", where=f"metric {key}")
    elif len(ids) != result.n:
        raise StageError(f"{result.n} of {len(ids)} predictions scored, without their ids", where=f"metric {key}")
    try:
        entry = _entry(component, result) | {"ids": [str(name) for name in ids]}
    except (TypeError, ValueError) as error:
        raise StageError(f"not a result: {error}", where=f"metric {key}") from error
    weights = entry["weights"]
    if weights is not None and (len(weights) != result.n or not all(w is not None and w >= 0 for w in weights)):
        raise StageError(f"weights are {result.n} finite numbers of 0 or more", where=f"metric {key}")
    return entry


def _entry(component: Component[Metric], result: MetricResult) -> dict[str, Any]:
    """``result`` as JSON data, with what its metric declares. Raises ``TypeError`` or ``ValueError`` for no numbers."""
    spec: Any = component.found.spec
    return entry_of(result, higher_is_better=spec.direction(component.params), unit=spec.unit)


def entry_of(result: MetricResult, *, higher_is_better: bool | None, unit: str) -> dict[str, Any]:
    """``result`` as JSON data, without ids. Raises ``TypeError`` or ``ValueError`` for no numbers."""
    if result.link not in ("identity", "exp"):
        raise ValueError(f"link is {result.link!r}")
    return {
        "value": _finite(result.value),
        "per_example": [_finite(value) for value in result.per_example],
        "n": int(result.n),
        "weights": None if result.weights is None else [_finite(weight) for weight in result.weights],
        "link": result.link,
        "ids": [],
        **({"ci95": [float(bound) for bound in result.ci95]} if _is_interval(result.ci95) else {}),
        "counts": {str(what): int(number) for what, number in result.counts.items()},
        "higher_is_better": higher_is_better,
        "unit": unit,
    }


def _is_interval(ci95: tuple[float, float] | None) -> bool:
    return ci95 is not None and all(map(math.isfinite, ci95))


def _undefined(component: Component[Metric], reason: str, counts: Mapping[str, int] | None = None) -> dict[str, Any]:
    empty = MetricResult(value=math.nan, per_example=(), n=0, counts=counts or {})
    return _entry(component, empty) | {"reason": " ".join(reason.split())}


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _measures(score: ExampleScore | None) -> dict[str, float]:
    if score is None:
        return {}
    measures = {"nll": score.nll, "tokens": float(score.tokens)}
    return measures if score.teacher_kl is None else {**measures, "teacher_kl": score.teacher_kl}

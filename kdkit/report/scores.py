"""Reads ``scores.json`` files and merges them: several evaluate stages, models or datasets in one report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from kdkit.api.errors import DataError

__all__ = [
    "AnswerCounts",
    "DatasetFacts",
    "MergedModel",
    "MergedScores",
    "MetricScores",
    "QuantizationFacts",
    "read_scores",
]

V = TypeVar("V")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


Score: TypeAlias = Annotated[int | float | None, AfterValidator(_finite)]
"""A number, or None where the file has null, NaN or an infinity."""


class _Part(BaseModel):
    """Unknown keys are ignored, so that files of later versions stay readable."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class MetricScores(_Part):
    """One model's scores on one metric of one dataset; None among ``per_example`` is an undefined score.

    ``counts`` is what the metric wants its reader to know: how many predictions it left out, and why. ``reason`` says
    why there is no value where the metric is undefined. ``ci95`` is the interval of a metric of all examples together,
    which has no values per example. ``of_tokens`` says that weights count the model's own tokens, and not words or
    bytes, which are the same for all models.
    """

    value: Score
    n: int
    per_example: tuple[Score, ...]
    weights: tuple[float, ...] | None = None
    link: Literal["identity", "exp"] = "identity"
    ids: tuple[str, ...] = ()
    counts: dict[str, int] = {}
    ci95: tuple[float, float] | None = None
    of_tokens: bool = True
    reason: str = ""
    higher_is_better: bool | None
    unit: str = ""


class AnswerCounts(_Part):
    """How many answers a model gave to ``n`` rows, hit the token limit, were empty, and could not be judged.

    Files from before several answers were possible count rows only: there is one answer to each.
    """

    n: int
    answers: int
    truncated: int
    empty: int
    unjudged: int = 0

    @model_validator(mode="before")
    @classmethod
    def _one_answer_a_row(cls, data: Any) -> Any:
        return {"answers": data["n"], **data} if isinstance(data, dict) and "n" in data else data


class QuantizationFacts(_Part):
    """What a quantizer says about what it made: ``kdkit.api.QuantizedInfo`` with its name; None is not known.

    Errors are relative and squared, by layer: of its outputs on the rows of calibration where ``rtn_errors`` has
    the same figures for rounding to nearest, else of its weights.
    """

    quantizer: str
    bits: int | None = None
    group_size: int | None = None
    bytes_before: int | None = None
    layer_errors: dict[str, Score] = {}
    rtn_errors: dict[str, Score] = {}
    kept_rtn: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _ModelScores(_Part):
    path: str
    parameters: int | None = None
    bytes: int | None = None
    trained_tokens: int | None = None
    vocabulary: str | None = None
    kernel: str | None = None
    quantization: QuantizationFacts | None = None
    decoding: dict[str, Any] = {}
    speed: dict[str, Score] = {}
    results: dict[str, dict[str, MetricScores]]
    counts: dict[str, AnswerCounts] = {}


class _BaselineScores(_Part):
    results: dict[str, dict[str, MetricScores]]


class DatasetFacts(_Part):
    """Size of a test set, how many rows are not in it, and the category of each example.

    ``overlong`` prompts were too long to be asked, ``unreferenced`` rows have no reference, which a metric wanted.
    """

    n: int
    overlong: int = 0
    unreferenced: int = 0
    categories: dict[str, str] = {}


class _ScoresFile(_Part):
    models: dict[str, _ModelScores]
    baselines: dict[str, _BaselineScores] = {}
    datasets: dict[str, DatasetFacts]


@dataclass(slots=True)
class MergedModel:
    """A model with the results of all files it occurs in.

    Attributes:
        path: How the recipe names the model, or its directory.
        parameters: Number of parameters; None when it was not recorded. Likewise ``bytes`` on disk and the tokens the
            model was trained on by kdkit.
        vocabulary: What its tokens are, as a hash; None when it was not recorded.
        decoding: Dataset to decoding settings.
        speed: Speed and memory, from the first file that has them.
        results: Dataset to metric to scores.
        counts: Dataset to counts of answers.
        kernel: What computed its answers; None when it was not recorded.
        quantization: What its quantizer says; None for a model that is not quantised.
    """

    path: str
    parameters: int | None
    bytes: int | None
    trained_tokens: int | None
    decoding: dict[str, dict[str, Any]] = field(default_factory=dict)
    speed: dict[str, float | None] = field(default_factory=dict)
    results: dict[str, dict[str, MetricScores]] = field(default_factory=dict)
    counts: dict[str, AnswerCounts] = field(default_factory=dict)
    vocabulary: str | None = None
    kernel: str | None = None
    quantization: QuantizationFacts | None = None


@dataclass(slots=True)
class MergedScores:
    """All models and datasets, in the order the files give them.

    Attributes:
        models: Name to model.
        baselines: Trivial baseline to dataset to metric to scores.
        datasets: Name to facts.
        notes: What merging had to choose.
    """

    models: dict[str, MergedModel] = field(default_factory=dict)
    baselines: dict[str, dict[str, dict[str, MetricScores]]] = field(default_factory=dict)
    datasets: dict[str, DatasetFacts] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_scores(directories: Sequence[Path]) -> MergedScores:
    """Read and merge the ``scores.json`` of each directory.

    Raises:
        DataError: A file is missing or malformed, or two files say different things under one name.
    """
    merged = MergedScores()
    for directory in dict.fromkeys(directories):
        file = directory / "scores.json"
        scores = _read(file)
        for name, facts in scores.datasets.items():
            _agree(merged.datasets, name, facts, file=file, what=f"dataset {name!r}")
        for name, model in scores.models.items():
            _merge_model(merged, name, model, file)
        for name, baseline in scores.baselines.items():
            for dataset, results in baseline.results.items():
                known = merged.baselines.setdefault(name, {}).setdefault(dataset, {})
                for metric, result in results.items():
                    _agree(known, metric, result, file=file, what=f"baseline {name!r}: {metric} on {dataset!r}")
    if not any(results for model in merged.models.values() for results in model.results.values()):
        raise DataError("there is no score to report", where=", ".join(map(str, directories)) or "scores")
    return merged


def _read(file: Path) -> _ScoresFile:
    try:
        scores = _ScoresFile.model_validate_json(file.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read the scores: {error.strerror}",
            where=str(file),
            hint="give the scores output of an evaluate stage",
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise DataError(f"not a scores file: {place}: {first['msg']}", where=str(file)) from error
    for kind, entries in (("model", scores.models), ("baseline", scores.baselines)):
        for name, entry in entries.items():
            for dataset, results in entry.results.items():
                if dataset not in scores.datasets:
                    raise DataError(f"{kind} {name!r} has results on unknown dataset {dataset!r}", where=str(file))
                for metric, result in results.items():
                    _check(result, f"{kind}s.{name}.results.{dataset}.{metric}", file)
    return scores


def _check(result: MetricScores, place: str, file: Path) -> None:
    n = len(result.per_example)
    problem = None
    if result.per_example and n != result.n:
        problem = f"{n} per-example values for n = {result.n}"
    elif result.weights is not None and len(result.weights) != n:
        problem = f"{len(result.weights)} weights for {n} values"
    elif result.weights is not None and not all(0 <= weight < math.inf for weight in result.weights):
        problem = "a weight is negative or not finite"
    elif len(result.ids) not in (0, n):
        problem = f"{len(result.ids)} ids for {n} values"
    if problem:
        raise DataError(f"not a scores file: {place}: {problem}", where=str(file))


def _merge_model(merged: MergedScores, name: str, new: _ModelScores, file: Path) -> None:
    facts = ("path", "parameters", "bytes", "trained_tokens")
    model = merged.models.setdefault(name, MergedModel(**{fact: getattr(new, fact) for fact in facts}))
    for fact in facts:
        if getattr(model, fact) != getattr(new, fact):
            raise _conflict(f"model {name!r}: {fact}", getattr(model, fact), getattr(new, fact), file)
    if model.vocabulary and new.vocabulary and model.vocabulary != new.vocabulary:
        raise _conflict(f"model {name!r}: vocabulary", None, None, file)
    model.vocabulary = model.vocabulary or new.vocabulary
    model.kernel = model.kernel or new.kernel
    model.quantization = model.quantization or new.quantization
    for dataset, results in new.results.items():
        _agree(model.decoding, dataset, new.decoding, file=file, what=f"model {name!r} on {dataset!r}: decoding")
        known = model.results.setdefault(dataset, {})
        for metric, result in results.items():
            _agree(known, metric, result, file=file, what=f"model {name!r}: {metric} on {dataset!r}")
    for dataset, counts in new.counts.items():
        _agree(model.counts, dataset, counts, file=file, what=f"model {name!r}: counts on {dataset!r}")
    if model.speed and new.speed and model.speed != new.speed:
        merged.notes.append(f"{name}: speed was measured several times; the first measurement is shown")
    model.speed = model.speed or new.speed


def _agree(known: dict[str, V], key: str, new: V, *, file: Path, what: str) -> None:
    if known.setdefault(key, new) != new:
        raise _conflict(what, None, None, file)


def _conflict(what: str, old: Any, new: Any, file: Path) -> DataError:
    values = f" ({old!r} and {new!r})" if old != new else ""
    return DataError(
        f"{what} differs between the scores to merge{values}",
        where=str(file),
        hint="give the two different names in their evaluate stages",
    )

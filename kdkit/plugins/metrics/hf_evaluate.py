"""Metrics of Hugging Face's package evaluate: one script, any of its results, with values per example where it can."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import evaluate
from datasets import Features, Value
from evaluate.loading import CachedEvaluationModuleFactory, import_main_class

from kdkit.api.data import MetricResult, Prediction
from kdkit.api.errors import DataError, EnvironmentUnmet, KdkitError
from kdkit.plugins.metrics.results import named, occurred, plain_mean
from kdkit.report.resampling import corpus_interval

if TYPE_CHECKING:
    from kdkit.plugins.metrics.hf_plugin import HfEvaluateParams

__all__ = ["HfEvaluate"]

_TYPES: Final = ("metric", "measurement")
_BREAKS: Final = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a metric raises on a single answer that it was not made for."""
_SAME: Final = 1e-9
"""Relative; a mean may have been summed in another order."""


class HfEvaluate:
    """See ``HfEvaluateParams``."""

    def __init__(self, params: HfEvaluateParams) -> None:
        self._params = params
        self._where = f"hf-evaluate {params.name}"
        self._module = _loaded(params, self._where)
        self._features = _features(self._module, self._where)

    def score(self, predictions: Sequence[Prediction], /) -> MetricResult:
        """See :class:`kdkit.api.Metric`.

        Raises:
            DataError: No answer has a reference, or the metric does not take these answers.
        """
        scored = [(key, item) for key, item in named(predictions) if item.references or not self._compares]
        if not scored:
            what = f"none of {len(predictions)} predictions has a reference to compare with"
            raise DataError(what, where=self._where, hint="evaluate on rows with answers, or choose another metric")
        ids, items = [key for key, _ in scored], [item for _, item in scored]
        counts = {"predictions without references": len(predictions) - len(scored)}
        found = self._whole(items)
        if isinstance(found, list):
            return plain_mean(list(zip(ids, found, strict=True)), counts)
        singles = self._singles(items)
        if singles and math.isclose(math.fsum(singles) / len(singles), found, rel_tol=_SAME, abs_tol=_SAME):
            return plain_mean(list(zip(ids, singles, strict=True)), counts)

        def again(indices: list[int]) -> float:
            return self._number_of([items[index] for index in indices])

        ci95 = corpus_interval(again, ids, resamples=self._params.resamples)
        return MetricResult(value=found, per_example=(), n=len(items), counts=occurred(counts), ci95=ci95)

    @property
    def _compares(self) -> bool:
        return "references" in self._features

    def _whole(self, items: Sequence[Prediction]) -> float | list[float]:
        try:
            return self._value(self._computed(items), len(items))
        except _BREAKS as error:
            what = f"it cannot score these answers: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise DataError(what, where=self._where) from error

    def _singles(self, items: Sequence[Prediction]) -> list[float]:
        """What it gives for each answer alone; empty where it does not take single answers."""
        values: list[float] = []
        for item in items:
            values.append(self._number_of([item]))
            if not math.isfinite(values[-1]):
                return []
        return values

    def _number_of(self, items: Sequence[Prediction]) -> float:
        """Its number for some answers; NaN where it has none."""
        try:
            value = self._value(self._computed(items), len(items))
        except (*_BREAKS, KdkitError):
            return math.nan
        return value if isinstance(value, float) else math.nan

    def _computed(self, items: Sequence[Prediction]) -> Mapping[str, Any]:
        first = "predictions" if "predictions" in self._features else "data"
        given: dict[str, Any] = {first: [_whole_characters(item.text) for item in items]}
        if self._compares:
            lists = not isinstance(self._features["references"], Value)
            references = [[_whole_characters(text) for text in item.references] for item in items]
            given["references"] = references if lists else [texts[0] for texts in references]
        found: Mapping[str, Any] = self._module.compute(**given, **self._params.options) or {}
        return found

    def _value(self, found: Mapping[str, Any], count: int) -> float | list[float]:
        """The result that counts: a number, or one for each answer."""
        numbers = {name: number for name, value in found.items() if (number := _number(value, count)) is not None}
        name = self._params.value or (self._params.name if self._params.name in numbers else None)
        if name is None and len(numbers) == 1:
            (name,) = numbers
        if name not in numbers:
            what = f"it has no result {name!r}" if name else "it has several results"
            hint = "set value to one of them" if numbers else "its results are neither numbers nor one for each answer"
            raise DataError(what, where=self._where, allowed=", ".join(numbers) or None, hint=hint)
        return numbers[name]


def _whole_characters(text: str) -> str:
    """Halves of characters cannot stand in the tables that evaluate makes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _number(value: Any, count: int) -> float | list[float] | None:
    """A number, numbers for ``count`` answers, or None."""
    if isinstance(value, str | bytes | Mapping) or value is None:
        return None
    try:
        if hasattr(value, "__len__"):
            return [float(item) for item in value] if len(value) == count else None
        return float(value)
    except (TypeError, ValueError):
        return None


def _loaded(params: HfEvaluateParams, where: str) -> Any:
    """The metric's object. No script is fetched: only files that are named or that are here already."""
    try:
        module = (
            evaluate.load(_script(params.path), keep_in_memory=True) if params.path else _fetched_before(params.name)
        )
    except ImportError as error:
        raise EnvironmentUnmet(" ".join(str(error).split()), where=where) from error
    except ConnectionError as error:
        hint = "what the script fetches has to be on this machine"
        raise EnvironmentUnmet(" ".join(str(error).split())[:300], where=where, hint=hint) from error
    if module.module_type not in _TYPES:
        raise DataError(f"it is a {module.module_type}", where=where, allowed="a metric or a measurement")
    return module


def _script(path: Path) -> str:
    script = path if path.suffix == ".py" else path / f"{path.name}.py"
    if not script.is_file():
        raise DataError("no such script", where=str(script), hint="path is a script, or a directory DIR with DIR.py")
    return str(script)


def _fetched_before(name: str) -> Any:
    """The script that evaluate keeps under this name, found without asking the Hub."""
    names = [name.replace("/", "--")] if "/" in name else [f"evaluate-{kind}--{name}" for kind in _TYPES]
    for stored in names:
        try:
            module = CachedEvaluationModuleFactory(stored).get_module()
        except FileNotFoundError:
            continue
        return import_main_class(module.module_path)(hash=module.hash, keep_in_memory=True)
    raise EnvironmentUnmet(
        f"the metric {name!r} is not on this machine, and kdkit does not fetch code",
        hint="get its directory, read it, and set path: ./DIRECTORY",
    )


def _features(module: Any, where: str) -> Mapping[str, Any]:
    """Names and types of the inputs; of several possibilities the first one that takes lists of references."""
    offered = module.features if isinstance(module.features, list) else [module.features]
    usable: list[Features] = [
        features
        for features in offered
        if set(features) <= {"predictions", "references", "data"} and {"predictions", "data"} & set(features)
    ]
    if not usable:
        names = ", ".join(offered[0])
        raise DataError(f"it wants {names}", where=where, allowed="predictions and references, or data alone")
    return min(usable, key=lambda features: isinstance(features.get("references"), Value))

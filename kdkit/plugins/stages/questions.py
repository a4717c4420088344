"""The rows that every model of an evaluation is asked: chosen before the first one answers, the same for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kdkit.api.errors import DataError
from kdkit.plugins.stages.slots import metric_key, needs_reference
from kdkit.train.encoding import encode_prompts

if TYPE_CHECKING:
    from kdkit.api import Component, Example, Metric, StageContext
    from kdkit.models.chat import ChatEncoder
    from kdkit.plugins.stages.plugin import EvaluateParams

__all__ = ["Loaded", "load_questions", "prompt_ids", "without_overlong"]


class Loaded(NamedTuple):
    """The rows of a dataset that are asked, and how many are not because they have no reference."""

    rows: list[Example]
    unreferenced: int


def load_questions(params: EvaluateParams, ctx: StageContext) -> dict[str, Loaded]:
    """The rows of every dataset.

    Where a metric wants references: those that have one, so that all metrics are over the same rows; all rows of a
    dataset that has none.

    Raises:
        DataError: A dataset is empty, has ids twice, or no references while every metric wants one.
    """
    return {name: _load(name, component, params.metrics, ctx) for name, component in params.data.items()}


def without_overlong(
    data: Mapping[str, Sequence[Example]], encoders: Sequence[ChatEncoder], params: EvaluateParams, ctx: StageContext
) -> dict[str, list[Example]]:
    """``data`` without the rows whose prompt is too long for some model; all rows where that is to be an error.

    Raises:
        DataError: Nothing is left of a dataset.
    """
    if params.overlong_prompts == "fail":
        return {name: list(rows) for name, rows in data.items()}
    kept = {}
    for name, rows in data.items():
        limit = params.max_prompt_length
        fits = [all(len(encoder.prompt(row)) <= limit for encoder in encoders) for row in rows]
        kept[name] = [row for row, good in zip(rows, fits, strict=True) if good]
        if not kept[name]:
            raise DataError(
                f"all {len(rows)} prompts have more than max_prompt_length={limit} tokens", where=f"dataset {name}"
            )
        if len(kept[name]) < len(rows):
            dropped = len(rows) - len(kept[name])
            ctx.log(f"{name}: {dropped} of {len(rows)} prompts over max_prompt_length={limit} are left out")
    return kept


def prompt_ids(encoder: ChatEncoder, dataset: str, rows: Sequence[Example], params: EvaluateParams) -> list[list[int]]:
    """Token ids of every prompt. Raises ``DataError`` for one over ``max_prompt_length``."""
    limit = params.max_prompt_length
    return encode_prompts(rows, encoder, max_prompt_length=limit, name=f"dataset {dataset}")


def _load(name: str, component: Any, metrics: Sequence[Component[Metric]], ctx: StageContext) -> Loaded:
    loaded = list(ctx.load(component).examples)
    wanting = [metric_key(metric) for metric in metrics if needs_reference(metric)]
    rows = ([row for row in loaded if row.targets] if wanting else loaded) or loaded
    if not rows or (not rows[0].targets and len(wanting) == len(metrics)):
        raise DataError("no row has a reference to score against", where=f"dataset {name}")
    if not rows[0].targets and wanting:
        ctx.log(f"{name}: no row has a reference, so that it has no {', '.join(wanting)}")
    unreferenced = len(loaded) - len(rows)
    if unreferenced:
        ctx.log(
            f"{name}: {unreferenced} of {len(loaded)} rows have no reference, which {', '.join(wanting)} wants, "
            "and are left out"
        )
    repeated = [row for row, count in Counter(row.id for row in rows).items() if count > 1]
    if repeated:
        raise DataError(f"{len(repeated)} ids stand for several rows, such as {repeated[0]!r}", where=f"dataset {name}")
    return Loaded(rows, unreferenced)

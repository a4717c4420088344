"""Parameters of the cache-teacher stage. Light: no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kdkit.api import Component, Model, OneOrMore, Params, Ref, SignalCache, StageContext, StageSpec
from kdkit.api.protocols import DatasetLoader, StageOutputs, Teacher

if TYPE_CHECKING:
    from typing import Any

__all__ = ["CACHE_TEACHER", "CacheTeacherStageParams"]


class CacheTeacherStageParams(Params):
    """A teacher's most probable tokens for every learned token of the rows, on disk."""

    teacher: Component[Teacher]
    """Who is asked; it must share the student's vocabulary."""
    student: Ref[Model]
    """The model that will be trained: its tokenizer and template render the rows, its vocabulary bounds the ids, and
    its own distribution is where the error of the gradient is measured."""
    data: OneOrMore[Component[DatasetLoader]]
    """Every row that training will see, and the rows of its eval_data."""
    max_length: int = Field(1024, ge=2)
    """Longest row in tokens, as in training."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Rows over ``max_length``, as in training."""
    temperature: float = Field(1.0, gt=0)
    """Softmax temperature of the stored probabilities; the losses must have the same."""
    mass: float = Field(0.999, gt=0, le=1)
    """Keep the most probable tokens until they have this much probability together."""
    min_probability: float = Field(3.5e-4, ge=0, lt=1)
    """Leave out less probable tokens, which cost more bytes than they tell; their probability is kept as one number."""
    max_k: int = Field(512, ge=1)
    """Keep at most this many tokens."""
    bits: int = Field(7, ge=6, le=16)
    """Bits of a probability's cube root before coding; one bit more halves its error."""
    per_device_batch_size: int = Field(8, ge=1)
    """Rows of one forward pass; in bf16 the rounding depends on it."""
    measured_rows: int = Field(32, ge=1)
    """Rows on which the error of the cache is measured."""
    extends: Ref[SignalCache] | None = None
    """A cache of the same teacher, rule and student: its rows become part of this one, and only rows that it does not
    have are asked. Another teacher or rule is refused."""


def _run(params: CacheTeacherStageParams, ctx: StageContext) -> StageOutputs:
    from kdkit.plugins.stages.caching import run

    return run(params, ctx)


def _check(params: CacheTeacherStageParams) -> list[tuple[tuple[str | int, ...], str]]:
    spec: Any = params.teacher.found.spec
    if not spec.gives & {"logits", "topk"}:
        return [(("teacher", "use"), f"'{params.teacher.name}' gives neither logits nor topk")]
    return []


CACHE_TEACHER: StageSpec[CacheTeacherStageParams] = StageSpec(
    name="cache-teacher",
    summary="Write a teacher's top-k probabilities of every learned token to disk",
    params=CacheTeacherStageParams,
    run=_run,
    outputs={"cache": SignalCache},
    check=_check,
)

"""Built-in teachers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kdkit.api import Model, Params, Precision, Ref, SignalCache, TeacherSpec, hookimpl

if TYPE_CHECKING:
    from kdkit.api import BuildContext, Teacher


class LocalTeacherParams(Params):
    """A model in this process: a Hub id, a directory, or a stage's output."""

    model: Ref[Model]
    """The teacher."""
    precision: Precision = "auto"
    """Weights and matrix products in bf16 or fp32."""
    batch_size: int = Field(32, ge=1)
    """Prompts decoded together when it writes answers; in bf16 the rounding, and so an answer, can depend on it."""


class CacheTeacherParams(Params):
    """What a teacher said about the rows, from disk: training needs no teacher in memory."""

    cache: Ref[SignalCache]
    """Output of a cache-teacher stage. Losses take its temperature, and rows must be the very same tokens."""
    model: Ref[Model] | None = None
    """Refuse a cache that was not taken from this model."""


def _local(params: LocalTeacherParams, ctx: BuildContext) -> Teacher:
    from kdkit.plugins.teachers.local import LocalTeacher

    return LocalTeacher(params, ctx)


def _cache(params: CacheTeacherParams, ctx: BuildContext) -> Teacher:
    from kdkit.plugins.teachers.cache import CacheTeacher

    return CacheTeacher(params, ctx)


@hookimpl
def kdkit_teachers() -> Iterator[TeacherSpec[Any]]:
    """The teachers."""
    yield TeacherSpec(
        name="local",
        summary="A Hugging Face model in this process: full logits and text",
        params=LocalTeacherParams,
        build=_local,
        gives=frozenset({"logits", "text"}),
    )
    yield TeacherSpec(
        name="cache",
        summary="What a cache-teacher stage wrote to disk: top-k with a tail, no model in memory",
        params=CacheTeacherParams,
        build=_cache,
        gives=frozenset({"topk"}),
    )

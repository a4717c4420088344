"""Built-in teachers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from kdkit.api import Model, Params, Precision, Ref, Runtime, TeacherSpec, hookimpl

if TYPE_CHECKING:
    from kdkit.api import BuildContext, Teacher


class LocalTeacherParams(Params):
    """A model in this process: a Hub id, a directory, or a stage's output."""

    model: Ref[Model]
    """The teacher."""
    precision: Precision = "auto"
    """Weights and matrix products in bf16 or fp32."""
    batch_size: Annotated[int, Runtime(), Field(ge=1)] = 32
    """Prompts decoded together when it writes answers."""


def _local(params: LocalTeacherParams, ctx: BuildContext) -> Teacher:
    from kdkit.plugins.teachers.local import LocalTeacher

    return LocalTeacher(params, ctx)


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

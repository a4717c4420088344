"""What kdkit reads of this package. Keep it light: what lists or checks components imports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdkit.api import (
    BuildContext,
    Component,
    Params,
    RecipeError,
    Teacher,
    TeacherSpec,
    hookimpl,
)
from pydantic import Field

GIVES = frozenset({"logits", "text"})


class AcmeParams(Params):
    """Another teacher, with its distributions sharpened."""

    teacher: Component[Teacher]
    """The teacher behind it; it gives logits and text, as ``local`` does."""
    sharpness: float = Field(1.5, gt=0)
    """Logits are multiplied by this. 1 changes nothing, less than 1 flattens."""


def _build(params: AcmeParams, ctx: BuildContext) -> Teacher:
    from kdkit_acme import teacher

    spec: Any = params.teacher.found.spec
    if not spec.gives >= GIVES:
        why = f"teacher {params.teacher.name!r} gives no {' and '.join(sorted(GIVES - spec.gives))}"
        raise RecipeError(why, hint="take another one, such as local")
    inner: Teacher = ctx.build(params.teacher)
    return teacher.AcmeTeacher(inner, params.sharpness)


@hookimpl
def kdkit_teachers() -> Iterator[TeacherSpec[Any]]:
    """The teachers of this package."""
    yield TeacherSpec(
        name="acme",
        summary="Another teacher with its distributions sharpened",
        params=AcmeParams,
        build=_build,
        gives=frozenset({"logits", "text"}),
    )

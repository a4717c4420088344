"""Whether a teacher that is not in this process is still the one that a stage began with."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from kdkit.api.errors import ModelError

if TYPE_CHECKING:
    from kdkit.api import StageContext, Teacher

__all__ = ["check_same_teacher"]

_FILE: Final = "teacher.json"


def check_same_teacher(teacher: Teacher, ctx: StageContext) -> None:
    """Keep what the teacher says about its weights; a resumed stage must hear the same.

    A name behind an address is all that the content key has of a served teacher. Teachers without ``identity()`` are
    in the key by their content.

    Raises:
        ModelError: Other weights than when the stage began.
    """
    identity = getattr(teacher, "identity", None)
    told = identity() if callable(identity) else None
    if told is None:
        return
    file = ctx.checkpoints / _FILE
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["teacher"]
    except (OSError, ValueError, KeyError, TypeError):
        # Not begun yet, or by a teacher that said nothing.
        ctx.log(f"teacher: {told}")
        ctx.checkpoints.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"teacher": told}), encoding="utf-8")
        return
    if before != told:
        raise ModelError(
            f"the teacher is another one than when this stage began: {told}, before {before}",
            where=f"stage {ctx.name}",
            hint="serve the model it began with, or run with --fresh",
        )

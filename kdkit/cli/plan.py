"""Body of ``kdkit plan``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdkit.api.errors import ExitCode
from kdkit.cli.output import emit, emit_json, table
from kdkit.engine.plan import PlannedStage, make_plan
from kdkit.engine.store import Store, store_root
from kdkit.recipe import load_recipe

if TYPE_CHECKING:
    from kdkit.engine.selection import Selection

__all__ = ["plan"]


def plan(recipe: Path, sets: Sequence[str], variables: Sequence[str], selection: Selection, *, as_json: bool) -> int:
    """Print what a run would do with each stage.

    Returns:
        0.

    Raises:
        KdkitError: The recipe is invalid or an input is missing.
    """
    loaded = load_recipe(recipe, sets=sets, variables=variables)
    made = make_plan(loaded, Store(store_root()), selection)
    if as_json:
        emit_json(made.to_json())
    else:
        emit(table(("STAGE", "KEY", "STATE", "WHY"), [_row(planned) for planned in made.stages]))
    return int(ExitCode.OK)


def _row(planned: PlannedStage) -> tuple[str, str, str, str]:
    if not planned.selected:
        return planned.name, planned.key, "left out", f"would be: {planned.state}"
    return planned.name, planned.key, planned.state, planned.why

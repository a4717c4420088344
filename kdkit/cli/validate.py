"""``kdkit validate`` and ``kdkit schema``: plain functions that print and return the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdkit.api.errors import EnvironmentUnmet, ExitCode, Problem

if TYPE_CHECKING:
    from kdkit.recipe import Checked

__all__ = ["schema", "validate"]


def validate(paths: Sequence[Path], sets: Sequence[str], variables: Sequence[str], as_json: bool) -> int:  # noqa: FBT001
    """Check recipes and print what is wrong with them, or their stages in the order they run.

    Args:
        paths: Recipe files; ``sets`` and ``variables`` apply to each.
        sets: ``PATH=VALUE`` overrides.
        variables: ``NAME=VALUE`` of declared variables.
        as_json: Print one JSON document instead of lines.

    Returns:
        0 when all are valid, 3 when only plugins are missing or broken, else 2.
    """
    from kdkit.host import Catalog
    from kdkit.recipe import check_recipe, exit_code

    catalog = Catalog.discover()
    results = {path: check_recipe(path, catalog=catalog, sets=sets, variables=variables) for path in paths}
    if as_json:
        print(json.dumps({"recipes": [_as_json(path, checked) for path, checked in results.items()]}, indent=2))
    else:
        print("\n".join(_as_text(results)))
    problems: list[Problem] = [problem for checked in results.values() for problem in checked.problems]
    return int(exit_code(problems))


def _as_text(results: Mapping[Path, Checked]) -> list[str]:
    from kdkit.recipe.explain import render

    lines = []
    for path, checked in results.items():
        if checked.recipe is None:
            lines.append(render(checked.problems, source=sys.stdout.isatty()))
        else:
            count = len(checked.recipe.stages)
            order = " -> ".join(checked.recipe.stages)
            lines.append(f"{path}: valid, {count} stage{'' if count == 1 else 's'}: {order}")
    return lines


def _as_json(path: Path, checked: Checked) -> dict[str, Any]:
    from kdkit.recipe.explain import problem_to_json

    recipe = checked.recipe
    stages = [] if recipe is None else [{"name": stage.name, "kind": stage.kind} for stage in recipe.stages.values()]
    return {
        "file": str(path),
        "valid": recipe is not None,
        "name": None if recipe is None else recipe.name,
        "stages": stages,
        "problems": [problem_to_json(problem) for problem in checked.problems],
    }


def schema(out: Path | None) -> int:
    """Write the JSON schema of recipes, over all installed components, for editors.

    Args:
        out: File to write; standard output when None.

    Raises:
        EnvironmentUnmet: The file cannot be written.
    """
    from kdkit.host import Catalog
    from kdkit.recipe.schema import recipe_schema

    text = json.dumps(recipe_schema(Catalog.discover()), indent=2, ensure_ascii=False) + "\n"
    if out is None:
        sys.stdout.write(text)
        return int(ExitCode.OK)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentUnmet(f"cannot write the schema: {error.strerror}", where=str(out)) from error
    return int(ExitCode.OK)

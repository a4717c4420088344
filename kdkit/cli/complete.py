"""What a shell offers at TAB. Bodies are imported when a shell asks; the word at the cursor is ``incomplete``.

A shell waits for the answer, so that nothing here imports torch, and components come from a list that is remembered
(:mod:`kdkit.cli.complete_names`). What cannot be read, such as a recipe that is being edited, offers nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

__all__ = [
    "dists", "files", "kinds", "kinds_and_names", "known_models", "models", "names", "recipes", "reports", "runs",
    "sandboxes", "settings", "stages", "variables",
]  # fmt: skip


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in dict.fromkeys(words) if word.startswith(incomplete)]


def files(incomplete: str) -> list[str]:
    """Nothing: shells then offer files themselves, and know how to go on after a directory."""
    del incomplete
    return []


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipes(incomplete: str) -> list[str]:
    """Recipe files in the directory that is named so far, or up to two below it."""
    from kdkit.cli.complete_recipe import recipe_files

    return recipe_files(incomplete)


def stages(ctx: typer.Context, incomplete: str) -> list[str]:
    """Stages of the recipe on the command line."""
    from kdkit.cli.complete_recipe import stage_names

    return _starting(stage_names(_tree(ctx)), incomplete)


def variables(ctx: typer.Context, incomplete: str) -> list[str]:
    """``NAME=`` of the variables of the recipe on the command line."""
    from kdkit.cli.complete_recipe import variable_names

    return _starting((f"{name}=" for name in variable_names(_tree(ctx))), incomplete)


def settings(ctx: typer.Context, incomplete: str) -> list[str]:
    """``PATH=`` of everything that ``--set`` can change in the recipe on the command line."""
    from kdkit.cli.complete_names import component_names
    from kdkit.cli.complete_recipe import setting_paths

    tree = _tree(ctx)
    return _starting((f"{path}=" for path in setting_paths(tree, component_names())), incomplete) if tree else []


def _tree(ctx: typer.Context) -> dict[str, Any]:
    from kdkit.cli.complete_recipe import read_tree

    given = ctx.params.get("recipe") or ctx.params.get("recipes") or ()
    paths = [str(path) for path in (given if isinstance(given, list | tuple) else [given])]
    # Where the option at the cursor has no value yet, the words stay as they were typed.
    paths += [word for word in ctx.args if word.endswith((".yaml", ".yml"))]
    return read_tree(Path(paths[0]).expanduser()) if paths else {}


# --- components -------------------------------------------------------------------------------------------------------


def kinds(incomplete: str) -> list[str]:
    """Kinds of components."""
    from kdkit.cli.complete_names import component_names

    return _starting(component_names().kinds, incomplete)


def names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Components of the kind on the command line."""
    from kdkit.cli.complete_names import component_names

    return _starting(component_names().of_kind(str(ctx.params.get("kind"))), incomplete)


def kinds_and_names(incomplete: str) -> list[str]:
    """Kinds, components of every kind, and distributions."""
    from kdkit.cli.complete_names import component_names

    known = component_names()
    return _starting([*known.kinds, *known.names, *known.dists, *known.broken], incomplete)


def dists(incomplete: str) -> list[str]:
    """Distributions with plugins, broken ones too."""
    from kdkit.cli.complete_names import component_names

    known = component_names()
    return _starting([*known.dists, *known.broken], incomplete)


def sandboxes(incomplete: str) -> list[str]:
    """Sandboxes."""
    from kdkit.cli.complete_names import component_names

    return _starting(component_names().of_kind("sandbox"), incomplete)


# --- runs and models --------------------------------------------------------------------------------------------------


def runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of recipes that were run, ``RECIPE/TIME`` of their runs, and ``LAST``."""
    out = Path(ctx.params.get("out") or "runs")
    found = [run.relative_to(out) for run in _runs(out)]
    return _starting([*(run.parent.name for run in found), *(["LAST"] if found else []), *map(str, found)], incomplete)


def reports(incomplete: str) -> list[str]:
    """Names of recipes that were run, and directories of runs with a report."""
    found = [run for run in _runs(Path("runs")) if (run / "report.json").is_file()]
    return _starting([*(run.parent.name for run in found), *map(str, found)], incomplete)


def models(incomplete: str) -> list[str]:
    """Known models, and what stages of the latest runs made; ``NAME=`` before the cursor stays."""
    label, equals, typed = incomplete.rpartition("=")
    made = sorted(map(str, Path("runs").glob("*/latest/stages/*/model")))
    found = _starting([*_known(), *(path.removesuffix("/model") for path in made)], typed)
    return [f"{label}{equals}{model}" for model in found]


def known_models(incomplete: str) -> list[str]:
    """Models that kdkit knows by name."""
    return _starting(_known(), incomplete)


def _known() -> list[str]:
    from kdkit.models.catalogue import KNOWN

    return list(KNOWN)


def _runs(out: Path) -> list[Path]:
    """Directories of runs, the latest first."""
    found = [plan.parent for plan in out.glob("*/*/plan.json") if not plan.parent.is_symlink()]
    return sorted(found, key=lambda run: run.name, reverse=True)

"""A checked recipe: what the engine plans and runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from kdkit.api.errors import Problem
from kdkit.api.params import Params
from kdkit.api.protocols import Tracker
from kdkit.api.slots import Component, Found
from kdkit.host import Catalog

__all__ = ["Checked", "Locate", "Recipe", "Stage"]

Locate: TypeAlias = Callable[[tuple[str | int, ...]], tuple[str, int, int]]
"""From a parameter path to file, line and column; both numbers are 0 for what an option gave."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage, its parameters validated.

    Attributes:
        name: As the recipe calls it.
        kind: As the recipe writes it: ``distill`` or ``DIST/distill``.
        found: Its :class:`kdkit.api.StageSpec`, with the identity of the code behind it.
        params: Validated parameters.
        upstream: Stages whose outputs it reads, in the order it names them.
        locate: Place of a parameter, for errors found later.
    """

    name: str
    kind: str
    found: Found
    params: Params
    upstream: tuple[str, ...]
    locate: Locate


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole recipe.

    Attributes:
        name: Directory of its runs.
        seed: Every random stream derives from it.
        stages: In the order they run: upstream first, else as written.
        track: Trackers.
        path: The recipe file as it was given.
        base_dir: Absolute directory that relative paths start from.
        data: The recipe as plain JSON after ``extends``, variables and overrides, without ``extends`` and ``vars``.
        requires: Requirement strings, all met.
        catalog: The catalogue with the recipe's plugin files.
    """

    name: str
    seed: int
    stages: Mapping[str, Stage]
    track: tuple[Component[Tracker], ...]
    path: Path
    base_dir: Path
    data: Mapping[str, Any]
    requires: tuple[str, ...]
    catalog: Catalog


@dataclass(frozen=True, slots=True)
class Checked:
    """What checking a recipe found.

    Attributes:
        recipe: The recipe; None when there are problems.
        problems: Every mistake, in the order of the file.
        catalog: The catalogue that was used, with the plugin files that loaded.
    """

    recipe: Recipe | None
    problems: tuple[Problem, ...]
    catalog: Catalog

"""YAML to a typed, checked recipe. Errors carry file, line and column, and come all at once."""

from __future__ import annotations

from kdkit.recipe.check import check_recipe, exit_code, load_recipe
from kdkit.recipe.model import Checked, Recipe, Stage

__all__ = ["Checked", "Recipe", "Stage", "check_recipe", "exit_code", "load_recipe"]

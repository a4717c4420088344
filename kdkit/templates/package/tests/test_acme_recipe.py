from __future__ import annotations

from pathlib import Path

from kdkit.testing.plugin import InstallPlugin, RunRecipe

ROOT = Path(__file__).parents[1]
DIST = "kdkit-acme"
NAME = "acme"


def test_kdkit_finds_the_component(install_plugin: InstallPlugin) -> None:
    catalog = install_plugin(ROOT)
    entry = catalog.entry("COMPONENT_KIND", f"{DIST}/{NAME}")
    assert all(field.description for field in entry.spec.params.model_fields.values())


def test_the_recipe_runs(
    install_plugin: InstallPlugin, run_recipe: RunRecipe, tiny_model: Path
) -> None:
    install_plugin(ROOT)
    result = run_recipe(ROOT / "recipe.yaml", inline=True, var={"model": str(tiny_model)})
    assert result.ok, result.error

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from kdkit.host import Catalog

ROOT = Path(__file__).parents[1]


def generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_pages_are_in_sync():
    pages = generator().pages()
    written = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "reference").glob("*.md")}
    assert written == pages, "run: make docs"


def test_every_built_in_component_and_parameter_is_documented():
    catalog = Catalog.discover(disable=["*"])
    text = "".join(generator().pages().values())
    for entry in catalog.entries():
        assert f"## {entry.name}\n" in text
        for name, field in entry.spec.params.model_fields.items():
            assert field.description, f"{entry.kind} {entry.name}: {name} has no text"


def test_recipe_schema_is_in_sync():
    from kdkit.recipe.schema import recipe_schema

    written = json.loads((ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(recipe_schema(Catalog.discover(disable=["*"])))), "run: make docs"

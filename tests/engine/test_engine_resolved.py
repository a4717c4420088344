"""Which texts of a recipe are paths: those that a parameter took for one, not others that read the same."""

from __future__ import annotations

import json

import yaml

from kdkit.engine.resolved import resolved_data, to_yaml
from kdkit.recipe import load_recipe

PLUGIN = """
from pathlib import Path
from kdkit.api import Params, Scores, StageSpec, hookimpl

class Inner(Params):
    script: Path | None = None
    "A script."
    words: str = ""
    "No path."

class Outer(Params):
    name: str
    "No path."
    script: Path
    "A script."
    more: list[Path] = []
    "Scripts."
    by_name: dict[str, Path] = {}
    "Scripts."
    texts: dict[str, str] = {}
    "No paths."
    inner: Inner = Inner()
    "Settings."

@hookimpl
def kdkit_stages():
    yield StageSpec(name="paths", summary="Paths", params=Outer, run=print, outputs={"scores": Scores})
"""


def test_a_name_that_reads_like_a_path_stays_a_name(tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    stage = {
        "kind": "paths",
        "name": "words",
        "script": "./words",
        "more": ["a", "./b"],
        "by_name": {"x": "words"},
        "texts": {"y": "words", "z": "a"},
        "inner": {"script": "words", "words": "words"},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"kdkit": 1, "name": "n", "plugins": ["./plugin.py"], "stages": {"s": stage}}))
    found = resolved_data(load_recipe(file))["stages"]["s"]
    place = str(tmp_path)
    assert found == {
        "kind": "paths",
        "name": "words",
        "script": f"{place}/words",
        "more": [f"{place}/a", f"{place}/b"],
        "by_name": {"x": f"{place}/words"},
        "texts": {"y": "words", "z": "a"},
        "inner": {"script": f"{place}/words", "words": "words"},
    }
    assert yaml.safe_load(to_yaml(found)) == found

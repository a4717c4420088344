"""The recipe, from a file of problems to pass@1 in the report."""

from __future__ import annotations

from pathlib import Path

import pytest

import kdkit
from kdkit.testing.tiny import save_tiny_model

RECIPE = Path(__file__).parents[1] / "recipe.yaml"


@pytest.mark.usefixtures("needs_sandbox")
def test_the_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kdkit_humaneval

    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
    problems = Path(kdkit_humaneval.__file__).with_name("sample.jsonl")
    var = {"problems": str(problems), "model": str(save_tiny_model(tmp_path / "tiny"))}
    result = kdkit.run(RECIPE, var=var, set={"stages.eval.sampling.max_new_tokens": 4}, out=tmp_path)
    assert result.ok, result.error
    # Random weights solve nothing, and nothing was left unjudged.
    passed = result.report["models"]["model"]["metrics"]["pass-at-1"]
    assert (passed["value"], passed["n"]) == (0.0, 8)

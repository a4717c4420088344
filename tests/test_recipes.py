from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import kdkit
from kdkit.testing.tiny import save_tiny_model

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", layers=4)


def test_there_are_few_recipes():
    assert 1 <= len(RECIPES) <= 15


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid(recipe):
    assert kdkit.validate(recipe) == []


def test_quickstart_runs_with_a_tiny_model_and_is_cached_the_second_time(tiny, tmp_path):
    small = {
        "stages.answers.data.max_rows": 61,
        "stages.answers.sampling": {"do_sample": True, "max_new_tokens": 300},
        "stages.eval.sampling.max_new_tokens": 8,
        "stages.eval.data.test_fraction": 0.4,
        "stages.sft.data.test_fraction": 0.4,
        "stages.kd.data.test_fraction": 0.4,
        "stages.sft.max_length": 2000,
        "stages.kd.max_length": 2000,
        "stages.sft.max_steps": 4,
        "stages.kd.max_steps": 4,
    }
    var = {"teacher": str(tiny), "student": {"from": str(tiny), "keep_layers": 2}}
    result = kdkit.run(ROOT / "recipes" / "quickstart.yaml", set=small, var=var, out=tmp_path)
    assert result.ok, result.error
    report = result.report
    assert list(report["models"]) == ["base", "sft", "kd", "teacher"]
    for facts in report["models"].values():
        assert set(facts["metrics"]) == {"rouge-l", "perplexity", "teacher-kl"}
        assert all(metric["n"] > 3 for metric in facts["metrics"].values())
    tokens = {name: facts["trained_tokens"] for name, facts in report["models"].items()}
    assert tokens["sft"] == tokens["kd"] > 0 == tokens["base"] == tokens["teacher"]
    again = kdkit.run(ROOT / "recipes" / "quickstart.yaml", set=small, var=var, out=tmp_path)
    events = [json.loads(line) for line in (again.run_dir / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if event["type"] == "stage-started"]
    assert again.report == report


def test_the_recipe_in_the_readme_is_valid(tmp_path):
    (text,) = [block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "kdkit: 1" in block]
    (tmp_path / "my.yaml").write_text(text)
    assert kdkit.validate(tmp_path / "my.yaml") == []


def test_the_plugin_in_the_readme_works(tiny, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my_losses.py").write_text(code)
    rows = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "kind": "sft",
        "model": str(tiny),
        "data": {"use": "jsonl", "source": "./rows.jsonl"},
        "losses": [{"use": "focal-ce", "gamma": 1.5}],
        "max_steps": 2,
    }
    recipe = {"kdkit": 1, "name": "mine", "plugins": ["./my_losses.py"], "stages": {"sft": stage}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    result = kdkit.run(tmp_path / "mine.yaml", out=tmp_path / "runs", inline=True)
    assert result.ok, result.error


def test_commands_in_the_readme_exist():
    import subprocess
    import sys

    commands = set(re.findall(r"^kdkit ([a-z]+(?: (?:list|show|diff|prune|pull)\b)?)", README, re.MULTILINE))
    assert {"validate", "plan", "run", "runs list", "report", "plugins list", "models prune", "doctor"} <= commands
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "kdkit", *command.split(), "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, command

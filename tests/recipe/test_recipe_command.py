from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pretend_plugins import PretendCatalog

import kdkit.host
from kdkit.api import EnvironmentUnmet, ExitCode, Problem
from kdkit.cli.validate import schema, validate
from kdkit.recipe.explain import problem_to_json, render

HEAD = "kdkit: 1\nname: test\n"
GOOD = HEAD + "stages: {b: {kind: train, model: '${stages.a.model}', data: {use: rows}}, a: {kind: make}}"
BAD = HEAD + "sede: 1\nstages: {a: {kind: make}}"


@pytest.fixture(autouse=True)
def pretend(monkeypatch):
    class Discovered:
        discover = staticmethod(PretendCatalog)

    monkeypatch.setattr(kdkit.host, "Catalog", Discovered)


def test_a_valid_recipe(desk, capsys):
    assert validate([desk.write("r.yaml", GOOD)], [], [], as_json=False) == 0
    assert capsys.readouterr().out == "r.yaml: valid, 2 stages: a -> b\n"


def test_problems_one_a_line_when_piped(desk, capsys):
    paths = [desk.write("good.yaml", GOOD), desk.write("bad.yaml", BAD)]
    assert validate(paths, [], [], as_json=False) == 2
    assert capsys.readouterr().out == (
        "good.yaml: valid, 2 stages: a -> b\nbad.yaml:3:1: sede: unknown key 'sede'; did you mean 'seed'?\n"
    )


def test_a_person_sees_the_line_and_a_caret(desk, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert validate([desk.write("bad.yaml", HEAD + "seed: -1\nstages: {a: {kind: make}}")], [], [], as_json=False) == 2
    assert capsys.readouterr().out.splitlines()[1:] == ["     3 | seed: -1", "       |       ^"]


def test_options_apply(desk, capsys):
    path = desk.write("r.yaml", GOOD)
    assert validate([path], ["stages.b.max_steps=0"], ["x=1"], as_json=False) == 2
    assert capsys.readouterr().out.splitlines() == [
        "--set #1: stages.b.max_steps: must be at least 1, got the number 0",
        "--var #1: no variable 'x'; the recipe has no vars:",
    ]


def test_json(desk, capsys):
    paths = [desk.write("good.yaml", GOOD), desk.write("bad.yaml", BAD)]
    assert validate(paths, [], [], as_json=True) == 2
    good, bad = json.loads(capsys.readouterr().out)["recipes"]
    assert good == {
        "file": "good.yaml",
        "valid": True,
        "name": "test",
        "stages": [{"name": "a", "kind": "make"}, {"name": "b", "kind": "train"}],
        "problems": [],
    }
    assert bad["problems"] == [
        {
            "file": "bad.yaml",
            "line": 3,
            "column": 1,
            "path": "sede",
            "message": "unknown key 'sede'; did you mean 'seed'?",
            "exit_code": 2,
        }
    ]


def test_the_exit_code_tells_missing_plugins_apart(desk):
    path = desk.write("r.yaml", HEAD + "requires: [acme]\nstages: {a: {kind: make}}")
    assert validate([path], [], [], as_json=False) == 3
    assert validate([path, desk.write("bad.yaml", BAD)], [], [], as_json=False) == 2


def test_schema_to_a_file_and_to_standard_output(desk, capsys):
    assert schema(Path("s.json")) == schema(None) == 0
    assert json.loads(Path("s.json").read_text()) == json.loads(capsys.readouterr().out)
    with pytest.raises(EnvironmentUnmet, match=r"no/s\.json: cannot write the schema"):
        schema(Path("no/s.json"))


def test_excerpts_are_cut_around_the_column_and_left_out_when_unreadable(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("a" * 300 + "X" + "b" * 300 + "\n\x1b[31m\n")
    lines = render([Problem(str(file), 1, 301, "p", "m")], source=True).splitlines()
    assert len(lines[1]) < 125
    assert lines[1][lines[2].index("^")] == "X"
    assert render([Problem(str(file), 2, 1, "p", "m")], source=True) == f"{file}:2:1: p: m"
    assert render([Problem(str(file), 99, 1, "p", "m")], source=True) == f"{file}:99:1: p: m"
    assert render([Problem("gone.yaml", 1, 1, "p", "m")], source=True) == "gone.yaml:1:1: p: m"
    assert problem_to_json(Problem("f", 1, 2, "p", "m", ExitCode.PLUGIN))["exit_code"] == 3


def test_validating_imports_nothing_heavy(tmp_path):
    mistakes = """\
kdkit: 1
name: x
sede: 1
stages:
  a: {kind: distil}
  b: {kind: sft, model: nothing-known, data: {use: jsonl, source: ./gone}, learning_rate: '1', max_step: 3}
  c: {kind: report, scores: ["${stages.d.scores}"]}
"""
    (tmp_path / "r.yaml").write_text(mistakes)
    code = """
import sys
from pathlib import Path
asked = []
class Deny:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "datasets", "accelerate", "safetensors", "numpy"}:
            asked.append(name)
            raise ImportError(name)
sys.meta_path.insert(0, Deny())
from kdkit.cli.validate import validate
code = validate([Path("r.yaml")], [], [], False)
assert not asked, asked
sys.exit(code)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert out.returncode == 2, out.stderr
    assert len(out.stdout.splitlines()) >= 7

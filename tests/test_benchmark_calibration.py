"""benchmarks/calibration.py takes its figures from the report as they stand there."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

import kdkit

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("calibration")
    sys.modules.pop("calibration", None)


def report(bench):
    """Model number i has the value i for every metric; pairs are listed both ways, as the report may."""
    names = (bench.FULL, "rtn", "gptq-rollouts", "gptq-answers")
    metrics = {name: {key: {"value": float(i), "n": 60} for key in bench.METRICS} for i, name in enumerate(names)}
    pairs = [
        {"a": a, "b": b, "metric": key, "difference": sign * i, "ci95": [sign * i - 0.5, sign * i + 0.5]}
        for i, name in enumerate(names[1:], 1)
        for a, b, sign in ((bench.FULL, name, -1.0), (name, bench.FULL, 1.0))
        for key in bench.METRICS
    ]
    return {"models": {name: {"metrics": found} for name, found in metrics.items()}, "pairs": pairs}


def test_a_row_is_the_model_and_its_difference_from_16_bits(bench):
    made = report(bench)
    full, rounded = bench.row("16 bits", made, bench.FULL), bench.row("rounded", made, "gptq-rollouts")
    exact = {"value": 0.0, "n": 60}
    lossy = {"value": 2.0, "n": 60, "difference": 2.0, "ci95": [1.5, 2.5]}
    assert full == {"student": "16 bits", **dict.fromkeys(bench.METRICS, exact)}
    assert rounded == {"student": "rounded", **dict.fromkeys(bench.METRICS, lossy)}
    cells = [line.strip("| ").split(" | ") for line in bench.table([full, rounded]).splitlines()[-2:]]
    assert cells == [["16 bits", *["0.000"] * 3], ["rounded", *["2.000 (+2.000; +1.500 to +2.500)"] * 3]]


def test_only_the_rows_that_calibrate_differ(bench, load_context, tmp_path, monkeypatch):
    """The recipe runs as it is, and once more with generic text in the place of the teacher's answers."""
    asked = []
    monkeypatch.setattr(bench, "report", lambda **settings: asked.append(settings) or report(bench))
    monkeypatch.setattr(bench, "RESULT", tmp_path / "calibration")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Once upon a time."}\n\n{"text": "There was\\na fox."}\n')
    monkeypatch.setattr(sys, "argv", ["calibration.py", "--text", str(text)])
    bench.main()
    first, second = asked
    assert first == {}
    calibration = dict(second["gptq-answers.calibration"])
    rows = kdkit.build("dataset", calibration.pop("use"), **calibration).load(load_context).examples
    assert [(example.prompt, example.completion) for example in rows] == [
        ("Once upon a time.", None),
        ("There was\na fox.", None),
    ]
    assert list(second["eval.models"]) == [bench.FULL, "gptq-answers"]
    assert kdkit.validate(bench.RECIPE, set={f"stages.{path}": value for path, value in second.items()}) == []
    table = json.loads((tmp_path / "calibration.json").read_text())
    assert [entry["teacher-kl"]["value"] for entry in table] == [0.0, 1.0, 2.0, 3.0, 3.0]
    assert len({entry["student"] for entry in table}) == 5

from __future__ import annotations

import json
import math
import subprocess
import sys
from datetime import datetime

import pytest

from kdkit.api import EnvironmentUnmet, RunInfo, TrackerSpec
from kdkit.plugins.trackers import plugin

SPECS = {spec.name: spec for spec in plugin.kdkit_trackers()}


def build(name, run_dir, stage="sft"):
    spec = SPECS[name]
    return spec.build(spec.params(), RunInfo(recipe="r", stage=stage, run_dir=run_dir, config={}))


def lines(run_dir):
    data = (run_dir / "metrics.jsonl").read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in data.split(b"\n") if line]


def test_declared_trackers():
    assert {name: spec.extras for name, spec in SPECS.items()} == {"jsonl": (), "tensorboard": ("tensorboard",)}
    assert all(isinstance(spec, TrackerSpec) for spec in SPECS.values())


def test_every_parameter_is_documented():
    for spec in SPECS.values():
        assert spec.params.__doc__
        assert all(info.description for info in spec.params.model_fields.values())


def test_the_plugin_module_is_light():
    code = (
        "import sys, kdkit.plugins.trackers.plugin;print(sorted({'torch', 'tensorboard', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_jsonl_lines(tmp_path):
    tracker = build("jsonl", tmp_path / "run")
    tracker.log({"loss": 1.5, "aé": 2}, 3)
    tracker.artifact(tmp_path / "x")
    tracker.finish("ok")
    (row,) = lines(tmp_path / "run")
    assert datetime.fromisoformat(row.pop("time")).utcoffset().total_seconds() == 0
    assert row == {"stage": "sft", "step": 3, "metrics": {"loss": 1.5, "aé": 2.0}}


def test_jsonl_numbers_that_json_lacks_are_null(tmp_path):
    build("jsonl", tmp_path).log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}, 0)
    assert lines(tmp_path)[0]["metrics"] == {"a": None, "b": None, "c": None, "d": 0.1}


def test_jsonl_stages_share_the_file(tmp_path):
    sft, kd = build("jsonl", tmp_path), build("jsonl", tmp_path, "kd")
    for step in range(3):
        sft.log({"x": step}, step)
        kd.log({"x": -step}, step)
    assert [(row["stage"], row["step"]) for row in lines(tmp_path)] == [
        (stage, step) for step in range(3) for stage in ("sft", "kd")
    ]


def test_jsonl_continues_after_a_torn_line(tmp_path):
    build("jsonl", tmp_path).log({"x": 1}, 1)
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"time": "2026-01-01T00:0')
    resumed = build("jsonl", tmp_path)
    resumed.log({"x": 2}, 2)
    resumed.log({"x": 3}, 3)
    first, torn, second, third, end = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["step"] for line in (first, second, third)] == [1, 2, 3]
    assert (torn, end) == (b'{"time": "2026-01-01T00:0', b"")


def test_jsonl_survives_kill_9(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from kdkit.api import RunInfo;"
        "from kdkit.plugins.trackers.jsonl import JsonlTracker;"
        "t = JsonlTracker(RunInfo(recipe='r', stage='s', run_dir=Path(sys.argv[1]), config={}));"
        "[t.log({'x': n}, n) for n in range(100)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert [row["step"] for row in lines(tmp_path)] == list(range(100))


def test_jsonl_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(EnvironmentUnmet, match=r"metrics\.jsonl: cannot be written: "):
        build("jsonl", tmp_path).log({"x": 1}, 1)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = build("tensorboard", tmp_path, "kd")
    tracker.log({"loss": 0.5, "lr": 1e-3}, 1)
    tracker.log({"loss": 0.25}, 2)
    tracker.artifact(tmp_path)
    tracker.finish("failed")
    events = EventAccumulator(str(tmp_path / "tensorboard" / "kd")).Reload()
    assert events.Tags()["scalars"] == ["loss", "lr"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_tensorboard_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(EnvironmentUnmet) as error:
        build("tensorboard", tmp_path)
    assert str(error.value) == (
        "track: tensorboard: the package tensorboard is missing; run: pip install 'kdkit[tensorboard]'"
    )


def test_tensorboard_that_cannot_be_written(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(EnvironmentUnmet, match="cannot be written"):
        build("tensorboard", tmp_path)

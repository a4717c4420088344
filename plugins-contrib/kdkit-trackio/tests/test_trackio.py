"""Everything that is logged is in the database, and nothing that goes wrong with it ends a stage in another way."""

from __future__ import annotations

import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import kdkit
from kdkit.api import EnvironmentUnmet, RunInfo, Tracker
from kdkit.testing.conformance import TrackerConformance
from kdkit.testing.tiny import save_tiny_model
from kdkit_trackio import tracker as implementation

RECIPE = Path(__file__).parents[1] / "recipe.yaml"


def rows(database: Path, columns: str, table: str = "metrics") -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(f"SELECT {columns} FROM {table} ORDER BY rowid").fetchall()


def logged(database: Path, name: str) -> list[tuple[int, Mapping[str, float]]]:
    return [(step, json.loads(text)) for run, step, text in rows(database, "run_name, step, metrics") if run == name]


def info(run_dir: Path, **changes: Any) -> RunInfo:
    return RunInfo(**{"recipe": "mine", "stage": "sft", "run_dir": run_dir, "config": {}, **changes})


def build(run: RunInfo, **params: Any) -> Tracker:
    built: Tracker = kdkit.build("tracker", "trackio", run, **params)
    return built


class TestTrackio(TrackerConformance):
    def build(self, run: RunInfo) -> Tracker:
        return build(run)

    def logged(self, run: RunInfo) -> list[tuple[int, Mapping[str, float]]]:
        return logged(run.run_dir / "trackio" / "conformance.db", f"{run.run_dir.name}/{run.stage}")


def test_runs_that_share_a_directory_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        tracker = build(info(tmp_path / "runs" / f"run-{number}"), directory="all", project="together")
        tracker.log({"loss": float(number)}, 1)
        tracker.finish("ok")
    for number in (1, 2):
        assert logged(tmp_path / "all" / "together.db", f"run-{number}/sft") == [(1, {"loss": float(number)})]
    assert not (tmp_path / "runs").exists()


def test_the_recipe_is_the_configuration_of_a_run(tmp_path: Path) -> None:
    config = {"name": "mine", "stages": {"sft": {"kind": "sft", "lr": 1e-5, "betas": [0.9, 0.99], "seed": None}}}
    tracker = build(info(tmp_path, config=config))
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("ok")
    ((text,),) = rows(tmp_path / "trackio" / "mine.db", "config", "configs")
    kept = {key: value for key, value in json.loads(text).items() if not key.startswith("_")}
    expected = {"kind": "sft", "lr": 1e-5, "betas": "[0.9, 0.99]", "seed": None}
    assert kept == {"name": "mine", **{f"stages.sft.{key}": value for key, value in expected.items()}}
    assert json.loads(text)["_Group"] == tmp_path.name


def test_names_that_trackio_keeps_for_itself_get_another(tmp_path: Path) -> None:
    tracker = build(info(tmp_path))
    tracker.log({"step": 5.0, "__x": 1.0, "loss": 2.0}, 3)
    tracker.finish("ok")
    kept = logged(tmp_path / "trackio" / "mine.db", f"{tmp_path.name}/sft")
    assert kept == [(3, {"metrics/step": 5.0, "metrics/__x": 1.0, "loss": 2.0})]


def test_variables_send_nothing_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9")
    tracker = build(info(tmp_path / "run"))
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("ok")
    assert logged(tmp_path / "run" / "trackio" / "mine.db", "run/sft") == [(1, {"loss": 1.0})]
    assert not (tmp_path / "other").exists()


def test_many_lines_at_once(tmp_path: Path) -> None:
    tracker = build(info(tmp_path))
    for step in range(3000):
        tracker.log({"train/some-long-name-of-a-metric": float(step)}, step)
    tracker.finish("ok")
    kept = logged(tmp_path / "trackio" / "mine.db", f"{tmp_path.name}/sft")
    assert [step for step, _ in kept] == list(range(3000))


def test_what_trackio_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    tracker = build(info(tmp_path), project="registry-mine")
    with pytest.raises(EnvironmentUnmet, match=r"track: trackio: ValueError: Project name 'registry-mine'") as failed:
        tracker.finish("ok")
    assert "\n" not in str(failed.value)


def test_lines_that_trackio_lost_are_told_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "trackio" / "mine.db").mkdir(parents=True)
    tracker = build(info(tmp_path))
    tracker.log({"loss": 1.0}, 1)
    with pytest.raises(EnvironmentUnmet, match="unable to open database file"):
        tracker.finish("ok")
    tracker.finish("ok")


def test_a_dead_process_is_one_line_and_stays_one(tmp_path: Path) -> None:
    tracker = build(info(tmp_path))
    tracker._writer.kill()
    tracker._writer.wait()
    with pytest.raises(EnvironmentUnmet, match="track: trackio: trackio ended"):
        tracker.log({"loss": 1.0}, 1)
    with pytest.raises(EnvironmentUnmet, match="has ended already"):
        tracker.log({"loss": 1.0}, 2)
    tracker.finish("failed")


def test_a_process_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_PATIENCE_S", 0.5)
    for use, words in ((lambda t: [t.log({"x" * 99: 1.0}, n) for n in range(5000)], "took nothing"), (None, "finish")):
        tracker = build(info(tmp_path))
        os.kill(tracker._writer.pid, signal.SIGSTOP)
        with pytest.raises(EnvironmentUnmet, match=words):
            use(tracker) if use else tracker.finish("ok")
        assert tracker._writer.returncode == -signal.SIGKILL


def test_a_stage_that_is_killed_keeps_its_curves(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys, kdkit\nfrom kdkit.api import RunInfo\n"
        "run = RunInfo(recipe='mine', stage='sft', run_dir=pathlib.Path(sys.argv[1]), config={})\n"
        "tracker = kdkit.build('tracker', 'trackio', run)\ntracker.log({'loss': 1.0}, 1)\n"
        "print(tracker._writer.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    writer = os.pidfd_open(int(done.stdout))
    # Ready to be read when the process has ended.
    assert select.select([writer], [], [], 120)[0]
    os.close(writer)
    assert logged(tmp_path / "trackio" / "mine.db", f"{tmp_path.name}/sft") == [(1, {"loss": 1.0})]


def test_the_recipe_trains_and_its_curves_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
    tiny = str(save_tiny_model(tmp_path / "tiny"))
    var = {"teacher": tiny, "student": tiny, "directory": str(tmp_path / "all")}
    short = {"stages.kd.max_steps": 2, "stages.kd.per_device_train_batch_size": 2, "stages.kd.max_length": 1024}
    result = kdkit.run(RECIPE, var=var, set=short | {"stages.kd.logging_steps": 1}, out=tmp_path)
    assert result.ok, result.error
    kept = rows(tmp_path / "all" / "tracked.db", "run_name, step, metrics")
    assert {step for _, step, _ in kept} >= {1, 2}
    assert {name.rpartition("/")[2] for name, _, _ in kept} == {"kd"}
    assert any("train/loss" in json.loads(text) for _, _, text in kept)

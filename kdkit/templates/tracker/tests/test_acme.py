from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import pytest
from kdkit.api import EnvironmentUnmet, RunInfo, Tracker
from kdkit.testing.conformance import TrackerConformance

from kdkit_acme import plugin

(SPEC,) = plugin.kdkit_trackers()


def build(run: RunInfo) -> Tracker:
    tracker: Tracker = SPEC.build(SPEC.params(), run)
    return tracker


def info(run_dir: Path, stage: str = "sft") -> RunInfo:
    return RunInfo(recipe="test", stage=stage, run_dir=run_dir, config={})


class TestTracker(TrackerConformance):
    def build(self, run: RunInfo) -> Tracker:
        return build(run)

    def logged(self, run: RunInfo) -> list[tuple[int, Mapping[str, float]]]:
        with (run.run_dir / "metrics.csv").open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["stage"] == run.stage]
        return [(int(row["step"]), {row["name"]: float(row["value"])}) for row in rows]


def test_stages_share_one_table(tmp_path: Path) -> None:
    build(info(tmp_path)).log({"loss": 0.5, "speed, tokens": 1.0}, 1)
    build(info(tmp_path, "kd")).log({"loss": float("nan")}, 2)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "stage,step,name,value",
        "sft,1,loss,0.5",
        'sft,1,"speed, tokens",1.0',
        "kd,2,loss,nan",
    ]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(EnvironmentUnmet) as error:
        build(info(tmp_path)).log({"loss": 0.5}, 1)
    assert error.value.where == str(tmp_path / "metrics.csv")

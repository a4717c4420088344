"""The built-in trackers keep the contract, and the suite catches trackers that do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import contextlib

from suites import check, checks_of, variant

from kdkit.api import EnvironmentUnmet
from kdkit.plugins.trackers import plugin
from kdkit.plugins.trackers.jsonl import JsonlTracker
from kdkit.testing.conformance import TrackerConformance

SPECS = {spec.name: spec for spec in plugin.kdkit_trackers()}


class TestJsonl(TrackerConformance):
    def build(self, run):
        return SPECS["jsonl"].build(SPECS["jsonl"].params(), run)

    def logged(self, run):
        rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["metrics"]) for row in rows if row["stage"] == run.stage]


class TestTensorboard(TrackerConformance):
    def build(self, run):
        pytest.importorskip("tensorboard")
        return SPECS["tensorboard"].build(SPECS["tensorboard"].params(), run)

    def logged(self, run):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run.run_dir / "tensorboard" / run.stage)).Reload()
        return [(e.step, {name: e.value}) for name in events.Tags()["scalars"] for e in events.Scalars(name)]


# -- wrong trackers


class Wrong(JsonlTracker):
    """The right one, for others to spoil."""

    def __init__(self, run):
        super().__init__(run)
        self.run, self.ended = run, False


class Unprintable(Wrong):
    def log(self, metrics, step):
        super().log({name: json.loads(json.dumps(value, allow_nan=False)) for name, value in metrics.items()}, step)


class Rounds(Wrong):
    def log(self, metrics, step):
        super().log({name: round(value, 1) for name, value in metrics.items()}, step)


class ForgetsTheLast(Wrong):
    """Writes what it has when the next line comes."""

    last = None

    def log(self, metrics, step):
        if self.last:
            super().log(*self.last)
        self.last = (dict(metrics), step)


class EndsOnce(Wrong):
    def finish(self, status):
        assert not self.ended, "finished already"
        self.ended = True


class KnowsTwoEnds(Wrong):
    def finish(self, status):
        {"ok": 0, "failed": 1}[status]


class OneStageOnly(Wrong):
    def __init__(self, run):
        super().__init__(run)
        (run.run_dir / "metrics.jsonl").unlink(missing_ok=True)


class MixesStages(Wrong):
    def log(self, metrics, step):
        self._stage = "sft"
        super().log(metrics, step)


class WritesHere(Wrong):
    def finish(self, status):
        Path("ledger.txt").write_text(status)


class WritesHome(Wrong):
    def finish(self, status):
        (Path.home() / ".tracker").mkdir()


class MovesArtifacts(Wrong):
    def artifact(self, path):
        path.rename(path.with_name("moved"))


class StampsArtifacts(Wrong):
    def artifact(self, path):
        if path.is_file():
            path.write_text(path.read_text() + "seen")


class AddsToMetrics(Wrong):
    def log(self, metrics, step):
        metrics["time"] = 1.0
        super().log(metrics, step)


class AddsToTheRecipe(Wrong):
    def finish(self, status):
        self.run.config["status"] = status


class Prints(Wrong):
    def finish(self, status):
        print("View the run at ...")


class PhonesHome(Wrong):
    def finish(self, status):
        import socket

        with contextlib.suppress(OSError):
            socket.create_connection(("192.0.2.1", 443), timeout=1)


class RaisesAnything(Wrong):
    def __init__(self, run):
        super().__init__(run)
        (run.run_dir / "mine").mkdir(exist_ok=True)


class TwoLines(Wrong):
    def log(self, metrics, step):
        try:
            super().log(metrics, step)
        except EnvironmentUnmet as error:
            raise EnvironmentUnmet("no\nroom") from error


class Away(Wrong):
    def log(self, metrics, step):
        raise ConnectionRefusedError("no server")


TAKES, LOST = "test_it_takes_whatever_stages_log", "test_nothing_is_lost"
ENDS, STAGES = "test_every_end_is_an_end", "test_stages_of_a_run_do_not_disturb_each_other"
RESUMED, PLACE = "test_a_resumed_stage_continues", "test_it_writes_into_the_run_only"
ARTIFACTS, GIVEN = "test_artifacts_stay_as_they_are", "test_what_it_is_given_stays_as_it_is"
PRINTS, LOCAL = "test_it_prints_nothing", "test_it_stays_on_this_machine"
DIRECTORY, SERVER = "test_a_directory_that_cannot_be_written_is_one_line", "test_a_server_that_is_away_is_one_line"
WRONG = [
    (Unprintable, TAKES, "Out of range float"),
    (Rounds, LOST, "is -?[0-9.]+, not"),
    (ForgetsTheLast, LOST, "kept are"),
    (EndsOnce, ENDS, "finished already"),
    (KnowsTwoEnds, ENDS, "stopped"),
    (OneStageOnly, RESUMED, "kept are"),
    (MixesStages, STAGES, "is -1.0, not 1.0|kept are"),
    (WritesHere, PLACE, r"it wrote .*here/ledger\.txt"),
    (WritesHome, PLACE, r"it wrote .*home/\.tracker"),
    (MovesArtifacts, ARTIFACTS, "No such file|changed"),
    (StampsArtifacts, ARTIFACTS, r"report\.md changed"),
    (AddsToMetrics, GIVEN, "does not support item assignment"),
    (AddsToTheRecipe, GIVEN, "the recipe's values were changed"),
    (Prints, PRINTS, "it printed 'View the run"),
    (PhonesHome, LOCAL, r"the network was used: connect to 192\.0\.2\.1:443"),
    (RaisesAnything, DIRECTORY, "Not a directory"),
    (TwoLines, DIRECTORY, "more than one line"),
    (Away, SERVER, "no server"),
]


def suite(tracker):
    return variant(TestJsonl, build=tracker, build_broken=tracker, logged=lambda run: TestJsonl().logged(run))


@pytest.mark.parametrize(("tracker", "test", "reason"), WRONG)
def test_a_wrong_tracker_fails(tracker, test, reason, tmp_path):
    with pytest.raises((AssertionError, KeyError, TypeError, ValueError, OSError), match=reason):
        check(suite(tracker), test, tmp_path)


@pytest.mark.parametrize("test", checks_of(TrackerConformance))
def test_a_right_tracker_passes_and_no_test_is_idle(test, tmp_path):
    assert test in {caught for _, caught, _ in WRONG}
    check(suite(Wrong), test, tmp_path)

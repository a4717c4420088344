"""Does a tracker keep what it is given, and nothing but the run's directory busy?

Subclass :class:`TrackerConformance` in a test file and run pytest:

    class TestLedger(TrackerConformance):
        def build(self, run):
            return build_ledger(LedgerParams(), run)

        def logged(self, run):
            return [(row["step"], row["metrics"]) for row in read(run.run_dir / "ledger.json")]
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal

import pytest

from kdkit.api.errors import KdkitError
from kdkit.api.protocols import RunInfo, Tracker
from kdkit.testing.conformance.checks import one_line, tree, unchanged
from kdkit.testing.network import network_refused

__all__ = ["TrackerConformance"]

_CONFIG: Final = {"name": "conformance", "stages": {"sft": {"kind": "sft", "learning_rate": 1e-5, "tags": ["a", None]}}}
_LOGGED: Final = ((1, {"train/loss": 2.5, "lr": 1e-5}), (2, {"train/loss": 1.25}), (10, {"eval/é rouge-l": -3.0}))


class TrackerConformance:
    """What every tracker must fulfil.

    Attributes:
        online: It talks to a server; without, reaching for the network fails.
    """

    online: ClassVar[bool] = False

    def build(self, run: RunInfo) -> Tracker:
        """The tracker for one stage of a run; ``run.run_dir`` may not exist yet."""
        raise NotImplementedError

    def build_broken(self, run: RunInfo) -> Tracker | None:
        """A tracker whose server is away or refuses, for those that have one."""
        del run
        return None

    def logged(self, run: RunInfo) -> list[tuple[int, Mapping[str, float]]] | None:
        """Reads back what was kept of the stage ``run.stage``, in order; None when that is not possible."""
        del run
        return None

    # -- helpers

    def _info(self, run_dir: Path, stage: str = "sft") -> RunInfo:
        run_dir.mkdir(parents=True, exist_ok=True)
        return RunInfo(recipe="conformance", stage=stage, run_dir=run_dir, config=copy.deepcopy(_CONFIG))

    def _kept(self, run: RunInfo) -> list[tuple[int, dict[str, float]]]:
        found = self.logged(run)
        if found is None:
            pytest.skip("what it kept cannot be read back")
        return [(step, dict(values)) for step, values in found]

    def _same(self, got: list[tuple[int, dict[str, float]]], wanted: list[tuple[int, dict[str, float]]]) -> None:
        """The same numbers, to the precision of float32, however they are grouped."""
        mine, its = _flat(got), _flat(wanted)
        assert mine.keys() == its.keys(), f"kept are {sorted(mine)}, logged were {sorted(its)}"
        for place, value in its.items():
            assert math.isclose(mine[place], value, rel_tol=1e-6), f"{place} is {mine[place]}, not {value}"

    # -- the contract

    def test_it_takes_whatever_stages_log(self, tmp_path: Path) -> None:
        """Integers, names with slashes and accents, numbers that are none, steps that repeat or go back, nothing."""
        run = self._info(tmp_path / "run")
        tracker = self.build(run)
        for step, values in (
            (0, {"loss": 1}),
            (0, {"a/b c": 0.0, "é": 1e-300}),
            (10**9, {"loss": math.nan, "x": math.inf, "y": -math.inf}),
            (3, {"loss": True}),
            (4, {}),
        ):
            tracker.log(values, step)
        tracker.finish("ok")

    def test_nothing_is_lost(self, tmp_path: Path) -> None:
        """Everything is kept when the stage has ended, also of one that failed."""
        run = self._info(tmp_path / "run")
        tracker = self.build(run)
        for step, values in _LOGGED:
            tracker.log(values, step)
        tracker.finish("failed")
        self._same(self._kept(run), [(step, dict(values)) for step, values in _LOGGED])

    def test_every_end_is_an_end(self, tmp_path: Path) -> None:
        """A stage ends well, badly or by a signal, perhaps before it logged anything, and perhaps twice."""
        for status in ("ok", "failed", "stopped"):
            tracker = self.build(self._info(tmp_path / "runs" / status))
            tracker.finish(status)
            tracker.finish(status)

    def test_stages_of_a_run_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        """Neither at the same time nor one after the other."""
        first, second = (self._info(tmp_path / "runs" / "both", stage) for stage in ("sft", "kd"))
        trackers = [(self.build(first), 1.0), (self.build(second), -1.0)]
        for step in (1, 2):
            for tracker, sign in trackers:
                tracker.log({"loss": sign * step}, step)
        for tracker, _ in trackers:
            tracker.finish("ok")
        for info, sign in ((first, 1.0), (second, -1.0)):
            self._same(self._kept(info), [(step, {"loss": sign * step}) for step in (1, 2)])

    def test_a_resumed_stage_continues(self, tmp_path: Path) -> None:
        """What was logged before a stage was stopped stays."""
        run = self._info(tmp_path / "run")
        ends: tuple[tuple[int, Literal["ok", "stopped"]], ...] = ((1, "stopped"), (2, "ok"))
        for step, status in ends:
            tracker = self.build(run)
            tracker.log({"loss": float(step)}, step)
            tracker.finish(status)
        self._same(self._kept(run), [(step, {"loss": float(step)}) for step in (1, 2)])

    def test_it_writes_into_the_run_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither into the current directory nor into the person's home."""
        for name, variable in (("home", "HOME"), ("temporary", "TMPDIR"), ("here", "")):
            (tmp_path / name).mkdir()
            if variable:
                monkeypatch.setenv(variable, str(tmp_path / name))
        monkeypatch.chdir(tmp_path / "here")
        run = self._info(tmp_path / "runs" / "conformance")
        self._whole(run, tmp_path / "runs" / "conformance" / "artifact")
        written = [path for path in tree(tmp_path) if not path.startswith("runs/conformance")]
        assert set(written) == {"home", "temporary", "here", "runs"}, f"it wrote {', '.join(sorted(written))}"

    def test_artifacts_stay_as_they_are(self, tmp_path: Path) -> None:
        """A file, a directory and one that is gone already: none is moved, changed or a reason to fail."""
        run = self._info(tmp_path / "run")
        folder = run.run_dir / "report"
        folder.mkdir()
        (folder / "report.md").write_text("# Report\n", encoding="utf-8")
        tracker = self.build(run)
        with unchanged(folder, "handing over artifacts"):
            for path in (folder, folder / "report.md"):
                tracker.artifact(path)
            tracker.finish("ok")

    def test_what_it_is_given_stays_as_it_is(self, tmp_path: Path) -> None:
        """The recipe's values and a stage's metrics are shared with everybody else."""
        run = self._info(tmp_path / "run")
        tracker = self.build(run)
        tracker.log(MappingProxyType({"loss": 1.0}), 1)
        tracker.finish("ok")
        assert run.config == _CONFIG, "the recipe's values were changed"

    def test_it_prints_nothing(self, tmp_path: Path) -> None:
        """Standard output belongs to the results of the command."""
        run = self._info(tmp_path / "run")
        said = io.StringIO()
        with redirect_stdout(said):
            self._whole(run, run.run_dir / "artifact")
        assert not said.getvalue(), f"it printed {said.getvalue()[:200]!r}"

    def test_it_stays_on_this_machine(self, tmp_path: Path) -> None:
        run = self._info(tmp_path / "run")
        with nullcontext() if self.online else network_refused():
            self._whole(run, run.run_dir / "artifact")

    def test_a_directory_that_cannot_be_written_is_one_line(self, tmp_path: Path) -> None:
        """A run goes on without its tracker: hours of training are worth more than a copy of the numbers."""
        file = tmp_path / "file"
        file.write_text("", encoding="utf-8")
        run = RunInfo(recipe="conformance", stage="sft", run_dir=file / "run", config={})
        with _may_fail("a directory that cannot be made"):
            self._whole(run, tmp_path / "artifact")

    def test_a_server_that_is_away_is_one_line(self, tmp_path: Path) -> None:
        run = self._info(tmp_path / "run")
        with _may_fail("a server that is away"):
            tracker = self.build_broken(run)
            if tracker is None:
                pytest.skip("it has no server")
            self._use(tracker, run.run_dir / "artifact")

    def _whole(self, run: RunInfo, artifact: Path) -> None:
        self._use(self.build(run), artifact)

    def _use(self, tracker: Tracker, artifact: Path) -> None:
        artifact.write_text("kept", encoding="utf-8")
        for step, values in _LOGGED:
            tracker.log(values, step)
        tracker.artifact(artifact)
        tracker.finish("ok")


@contextmanager
def _may_fail(what: str) -> Iterator[None]:
    """The block may raise a ``KdkitError`` of one line, and nothing else."""
    try:
        yield
    except KdkitError as error:
        one_line(error, what)


def _flat(rows: list[tuple[int, dict[str, Any]]]) -> dict[tuple[int, str], float]:
    return {(step, name): float(value) for step, values in rows for name, value in values.items()}

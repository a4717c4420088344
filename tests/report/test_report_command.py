from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_scores import study

from kdkit.api.artifacts import ReportFiles, Scores
from kdkit.api.errors import DataError, ExitCode, RecipeError
from kdkit.cli.report import report
from kdkit.report.collect import collect, write_report


@pytest.fixture
def data(write):
    return collect([write(study(n=20))], recipe="demo", seed=17)


@pytest.fixture
def runs(tmp_path, monkeypatch, data):
    """Makes ``runs/RECIPE/TIME``, with a report unless told otherwise; gives the directory."""
    monkeypatch.chdir(tmp_path)

    def make(recipe: str, time: str, *, reported: bool = True) -> Path:
        directory = Path("runs", recipe, time)
        directory.mkdir(parents=True)
        (directory / "recipe.yaml").write_text("kdkit: 1\n")
        if reported:
            write_report({**data, "recipe": f"{recipe} at {time}"}, directory)
        return directory

    return make


def test_newest_run_of_all_recipes(runs, capsys) -> None:
    runs("b", "2026-01-01T10-00-00Z")
    runs("a", "2026-01-02T10-00-00Z")
    Path("runs/b/latest").symlink_to("2026-01-01T10-00-00Z")
    assert report(None, False) == ExitCode.OK
    out = capsys.readouterr().out
    assert out.startswith("Report: a at 2026-01-02T10-00-00Z\n")
    assert "kd-int4" in out
    assert max(map(len, out.splitlines())) <= 80


def test_runs_started_in_one_second_are_in_order(runs, capsys) -> None:
    for suffix in ("", "-2", "-10"):
        runs("demo", f"2026-01-01T10-00-00Z{suffix}")
    report(None, True)
    assert json.loads(capsys.readouterr().out)["recipe"].endswith("Z-10")


def test_run_by_directory_by_file_and_by_recipe(runs, capsys) -> None:
    old = runs("demo", "2026-01-01T10-00-00Z")
    new = runs("demo", "2026-01-02T10-00-00Z")
    for name, wanted in [
        (str(old), old),
        (str(old / "report.json"), old),
        ("demo", new),
        ("runs/demo", new),
    ]:
        report(name, True)
        assert json.loads(capsys.readouterr().out)["recipe"] == f"demo at {wanted.name}"


def test_json_is_the_file(runs, capsys) -> None:
    directory = runs("demo", "t")
    report(str(directory), True)
    assert capsys.readouterr().out == (directory / "report.json").read_text()


def test_a_newer_run_without_report_is_named_not_skipped(runs) -> None:
    old = runs("demo", "2026-01-01T10-00-00Z")
    new = runs("demo", "2026-01-02T10-00-00Z", reported=False)
    for run in (None, "demo"):
        with pytest.raises(RecipeError, match=rf"{new}: this run has no report.*kdkit report {old}") as caught:
            report(run, False)
        assert caught.value.exit_code == ExitCode.INVALID
    with pytest.raises(RecipeError, match="no report"):
        report(str(new), False)


def test_no_run_at_all(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no run yet"):
        report(None, False)
    with pytest.raises(RecipeError, match="there is no run 'nothing'"):
        report("nothing", False)


@pytest.mark.parametrize(
    ("text", "named"), [("{", r"report\.json:1:2"), ("[]", "no datasets"), ('{"models": {}}', "pairs")]
)
def test_a_file_that_is_no_report(tmp_path, text, named) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match=named):
        report(str(tmp_path), False)


def test_showing_a_report_needs_no_numpy_and_no_torch(runs) -> None:
    runs("demo", "t")
    code = (
        "import sys; from kdkit.cli.report import report; report(None, False); "
        "print([m for m in ('numpy', 'torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


class Context:
    recipe = "demo"
    seed = 17

    def __init__(self, out: Path) -> None:
        self.out = out
        self.logged: list[str] = []

    def resolve(self, ref):
        return ref

    def seed_for(self, purpose: str) -> int:
        return len(purpose)

    def log(self, message: str) -> None:
        self.logged.append(message)


def test_the_stage_writes_both_files(write, tmp_path) -> None:
    from kdkit.plugins.stages.plugin import ReportParams
    from kdkit.plugins.stages.report_stage import run

    scores = Scores(path=write(study(n=20)))
    ctx = Context(tmp_path / "entry")
    params = ReportParams.model_construct(scores=[scores], teacher="teacher", baseline="base")
    made = run(params, ctx)["report"]
    assert isinstance(made, ReportFiles)
    assert made.path == tmp_path / "entry" / "report"
    data = json.loads((made.path / "report.json").read_text())
    assert data == collect([scores.path], recipe="demo", seed=17, bootstrap_seed=6, teacher="teacher", baseline="base")
    assert (made.path / "report.md").read_text().startswith("# Report: demo\n")
    assert made.info == {"models": ["base", "sft", "kd", "kd-int4", "teacher"]}
    assert len(data["notes"]) > 1
    assert ctx.logged == [f"{len(data['notes'])} notes on these numbers"], "they are printed with the tables"

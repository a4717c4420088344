from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kdkit
from kdkit.api import EnvironmentUnmet, ExitCode, RecipeError, StageError
from kdkit.engine.keys import KEY_FORMAT
from kdkit.engine.store import Store


def events(result):
    return [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]


def kinds(result, stage):
    return [event["type"] for event in events(result) if event["stage"] == stage]


def test_a_run_leaves_results_and_says_where(project):
    result = kdkit.run(project.recipe())
    assert result.ok
    assert result.exit_code == ExitCode.OK
    assert result.report == {"recipe": "demo", "seed": 3, "models": {}}
    data = result.stage("b").outputs["data"]
    assert data.path.read_text().startswith("a 3 ")
    assert data.info == {"rows": 2}
    assert [row["step"] for row in result.stage("a").metrics()] == [1, 2, 3]
    names = {p.name for p in result.run_dir.iterdir()}
    wanted = "recipe.yaml resolved.yaml plan.json env.json events.jsonl stages report.md report.json"
    assert set(wanted.split()) <= names
    assert (result.run_dir / "stages/a").resolve() == result.stage("a").entry
    assert (result.run_dir.parent / "latest").resolve() == result.run_dir
    assert "printed by a library" in (result.stage("a").entry / "stage.log").read_text()


def test_links_are_relative(project):
    result = kdkit.run(project.recipe(project.one), inline=True)
    assert not (result.run_dir.parent / "latest").readlink().is_absolute()
    assert not (result.run_dir / "stages/a").readlink().is_absolute()


def test_worker_and_inline_give_the_same_bytes(project, monkeypatch, tmp_path):
    worker = kdkit.run(project.recipe()).stage("b").outputs["data"].path.read_bytes()
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "other"))
    assert kdkit.run(project.recipe(), inline=True).stage("b").outputs["data"].path.read_bytes() == worker


def test_a_second_run_is_cached_and_starts_nothing(project, monkeypatch):
    first = kdkit.run(project.recipe())
    monkeypatch.setattr("kdkit.engine.runner.run_worker", lambda *_, **__: pytest.fail("a worker was started"))
    second = kdkit.run(project.recipe())
    assert second.ok
    assert [kinds(second, stage) for stage in "abc"] == [["stage-cached"]] * 3
    assert second.stage("b").entry == first.stage("b").entry
    assert second.report == first.report
    assert second.run_dir != first.run_dir


def test_killed_and_resumed_equals_straight_through(project, monkeypatch, tmp_path):
    straight = kdkit.run(project.recipe(project.one)).stage("a").outputs["data"].path.read_bytes()
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "other"))
    killed = kdkit.run(project.recipe("  a: {kind: count, steps: 3, fault: 'kill:3'}"))
    assert not killed.ok
    assert killed.exit_code == ExitCode.STAGE_FAILED
    assert "stage 'a': the worker was killed (SIGKILL)" in str(killed.error)
    assert project.entries() == []
    assert project.store.condition(project.plan(project.one).stage("a").entry_dir).checkpoint == "step-000002"
    with pytest.raises(StageError, match="has no result"):
        killed.stage("a")
    resumed = kdkit.run(project.recipe(project.one))
    assert resumed.stage("a").outputs["data"].path.read_bytes() == straight
    log = [event["message"] for event in events(resumed) if event["type"] == "log"]
    assert log == ["from step 2"]
    assert [row["step"] for row in resumed.stage("a").metrics()] == [1, 2, 3]


def test_fresh_starts_again(project):
    kdkit.run(project.recipe("  a: {kind: count, steps: 3, fault: 'kill:3'}"))
    result = kdkit.run(project.recipe(project.one), fresh=True)
    assert "from step 0" in [event.get("message") for event in events(result)]


def test_the_first_failure_ends_the_run(project):
    result = kdkit.run(project.recipe(), set={"stages.a.fault": "raise:2"})
    assert kinds(result, "b") == []
    assert "ValueError: broken with" in str(result.error)
    assert "fake_stages.py:" in str(result.error)
    assert "stages/a/stage.log" in str(result.error)
    assert "Traceback" in (result.run_dir / "stages/a/stage.log").read_text()


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("memory", ExitCode.STAGE_FAILED, "out of memory; lower per_device_train_batch_size"),
        ("disk", ExitCode.ENVIRONMENT, "/data/model.safetensors: the disk is full"),
        ("unmet", ExitCode.ENVIRONMENT, "no such device; use another"),
        ("exit", ExitCode.STAGE_FAILED, r"called sys.exit\(3\)"),
    ],
)
@pytest.mark.parametrize("inline", [True, False])
def test_errors_keep_their_exit_code_and_their_one_line(project, fault, code, message, inline):
    result = kdkit.run(project.recipe(project.one), set={"stages.a.fault": f"{fault}:1"}, inline=inline)
    assert result.exit_code == code
    with pytest.raises(type(result.error), match=message):
        raise result.error
    assert "\n" not in str(result.error)


@pytest.mark.parametrize(("kind", "message"), [("wrong", "returned other; allowed: data"), ("outside", "not a file")])
def test_a_stage_is_held_to_its_spec(project, kind, message):
    result = kdkit.run(project.recipe(f"  a: {{kind: {kind}}}"), inline=True)
    assert message in str(result.error)
    assert project.entries() == []


def test_an_empty_dataset_is_refused(project):
    result = kdkit.run(project.recipe("  a: {kind: count, data: {use: few, rows: 0}}"), inline=True)
    assert result.exit_code == ExitCode.INVALID
    assert "dataset few: no row is left (dropped 1)" in str(result.error)


def test_a_component_that_raises_is_named(project):
    result = kdkit.run(project.recipe("  a: {kind: count, data: {use: few, broken: true}}"), inline=True)
    assert "dataset 'few' of ./fake_stages.py" in str(result.error)
    assert "KeyError" in str(result.error)


def test_a_tracker_that_fails_does_not_stop_the_stage(project):
    result = kdkit.run(project.recipe(project.one, more="track: [{use: fragile}, {use: jsonl}]"), inline=True)
    assert result.ok
    lines = [event["message"] for event in events(result) if event["type"] == "log" and "tracker" in event["message"]]
    assert len(lines) == 1
    assert "ConnectionError: the server is away" in lines[0]
    assert len((result.run_dir / "metrics.jsonl").read_text().splitlines()) == 3


def test_damage_is_said_and_made_again(project):
    first = kdkit.run(project.recipe(project.one), inline=True).stage("a")
    path = first.outputs["data"].path
    good = path.read_bytes()
    path.write_bytes(b"X" + good[1:])
    result = kdkit.run(project.recipe(project.one), inline=True)
    assert result.ok
    assert path.read_bytes() == good
    assert any("is damaged (data.jsonl changed) and is made again" in str(e.get("message")) for e in events(result))


def test_downstream_runs_again_when_a_forced_stage_comes_out_different(project):
    stages = '  a: {kind: noisy}\n  b: {kind: count, source: "${stages.a.data}"}'
    first = kdkit.run(project.recipe(stages), inline=True)
    again = kdkit.run(project.recipe(stages), inline=True)
    assert kinds(again, "b") == ["stage-cached"]
    forced = kdkit.run(project.recipe(stages), force=("a",), inline=True)
    assert "stage-finished" in kinds(forced, "b")
    text = forced.stage("a").outputs["data"].path.read_text()
    assert forced.stage("b").outputs["data"].path.read_text().startswith(text)
    assert forced.stage("b").entry == first.stage("b").entry


def test_downstream_stays_cached_when_a_forced_stage_comes_out_the_same(project):
    kdkit.run(project.recipe(), inline=True)
    forced = kdkit.run(project.recipe(), force=("a",), inline=True)
    assert "stage-finished" in kinds(forced, "a")
    assert kinds(forced, "b") == ["stage-cached"]


def test_the_run_sees_the_recipe_as_it_was_planned(project):
    (project.root / "t.jinja").write_text("T")
    (project.root / "rows.jsonl").write_text("R")
    stages = "  a: {kind: count, source: ./rows.jsonl, template: t.jinja}"
    result = kdkit.run(project.recipe(stages), set={"stages.a.steps": 2})
    resolved = yaml.safe_load((result.run_dir / "resolved.yaml").read_text())
    assert resolved["stages"]["a"]["source"] == str(project.root / "rows.jsonl")
    assert resolved["stages"]["a"]["template"] == str(project.root / "t.jinja")
    assert resolved["plugins"] == [str(project.root / "fake_stages.py")]
    assert result.stage("a").outputs["data"].path.read_text().startswith("RTa 2 ")
    assert (result.run_dir / "recipe.yaml").read_bytes() == (project.root / "recipe.yaml").read_bytes()


def test_the_resolved_recipe_runs_alone_and_is_cached(project, monkeypatch, tmp_path):
    (project.root / "rows.jsonl").write_text("R")
    first = kdkit.run(project.recipe("  a: {kind: count, source: ./rows.jsonl}"), var=None)
    monkeypatch.chdir(tmp_path)
    again = kdkit.run(first.run_dir / "resolved.yaml", out=tmp_path / "runs")
    assert kinds(again, "a") == ["stage-cached"]


def test_code_that_changes_during_a_run_is_refused(project, monkeypatch):
    from kdkit.engine import runner

    def launch(*arguments, original=runner.run_worker):
        with (project.root / "fake_stages.py").open("a") as stream:
            stream.write("\n# edited\n")
        return original(*arguments)

    monkeypatch.setattr(runner, "run_worker", launch)
    result = kdkit.run(project.recipe(project.one))
    assert "the code of a component changed since the run was planned" in str(result.error)


@pytest.mark.parametrize("inline", [True, False])
def test_no_secret_is_written_anywhere(project, monkeypatch, inline):
    canary = "canary-5d41402abc4b2a76"
    monkeypatch.setenv("HF_TOKEN", canary)
    result = kdkit.run(project.recipe(project.one), set={"stages.a.fault": "raise:2"}, inline=inline)
    assert not result.ok
    store = Path(os.environ["KDKIT_STORE"])
    files = [p for root in (store, project.root) for p in root.rglob("*") if p.is_file()]
    assert any("stage.log" in p.name for p in files)
    assert [p for p in files if canary.encode() in p.read_bytes()] == []
    assert "***" in (result.run_dir / "events.jsonl").read_text()


def test_a_secret_in_the_recipe_is_refused_before_it_is_copied(project, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-5d41402abc4b2a76")
    with pytest.raises(RecipeError, match="secret environment variable stands in the recipe"):
        kdkit.run(project.recipe("  a: {kind: count, fault: canary-5d41402abc4b2a76}"))
    assert not (project.root / "runs").exists()


def test_unwritable_places_are_found_before_any_work(project, monkeypatch):
    with pytest.raises(EnvironmentUnmet, match="/dev/null/x/demo: cannot be written"):
        kdkit.run(project.recipe(), out="/dev/null/x")
    monkeypatch.setenv("KDKIT_STORE", "/dev/null/store")
    with pytest.raises(EnvironmentUnmet, match="/dev/null/store: cannot be written"):
        kdkit.run(project.recipe())
    assert not (project.root / "runs/demo/latest").exists()


def test_a_run_directory_that_leads_elsewhere_is_refused(project, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (project.root / "runs").mkdir()
    (project.root / "runs/demo").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentUnmet, match="leads elsewhere"):
        kdkit.run(project.recipe())


def test_an_invalid_recipe_raises_every_problem(project):
    with pytest.raises(RecipeError) as caught:
        kdkit.run(project.recipe("  a: {kind: count, stepz: 3, learning_rate: fast}"))
    assert len(caught.value.problems) == 2
    assert len(kdkit.validate(project.root / "recipe.yaml")) == 2


def test_overrides_keep_their_types(project):
    result = kdkit.run(
        project.recipe("  a: {kind: count, steps: '${vars.n}'}", more="vars: {n: 1}"),
        set={"stages.a.learning_rate": 2e-5, "stages.a.table": {"ö": 1.5}},
        var={"n": 2},
        inline=True,
    )
    plan = json.loads((result.run_dir / "plan.json").read_text())
    explained = plan["stages"][0]["explained"]
    assert explained["steps"] == 2
    assert explained["learning_rate"] == 2e-5
    assert explained["table.ö"] == 1.5


def test_another_store_entry_format_is_computed_again(project, monkeypatch):
    kdkit.run(project.recipe(project.one), inline=True)
    monkeypatch.setattr("kdkit.engine.keys.KEY_FORMAT", KEY_FORMAT + 1)
    assert kinds(kdkit.run(project.recipe(project.one), inline=True), "a") != ["stage-cached"]


def test_a_full_disk_while_publishing_keeps_the_checkpoints(project, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("kdkit.engine.store.fsync_file", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
        result = kdkit.run(project.recipe(project.one), inline=True)
    assert result.exit_code == ExitCode.ENVIRONMENT
    assert "the disk is full; make room, then resume" in str(result.error)
    assert project.plan(project.one).stage("a").state == "resume"
    assert kdkit.run(project.recipe(project.one), inline=True).ok


def test_a_crash_between_manifest_and_rename_is_only_published(project, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Store, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert not kdkit.run(project.recipe(project.one), inline=True).ok
    result = kdkit.run(project.recipe(project.one), inline=True)
    assert result.ok
    assert "stage-started" not in kinds(result, "a")


def test_notifications_reach_plugins_and_may_fail(project):
    with (project.root / "fake_stages.py").open("a") as stream:
        stream.write(
            "\n\n@hookimpl\ndef kdkit_stage_finished(event):\n"
            "    (event.run_dir / f'told-{event.stage}-{event.status}').write_text('')\n"
            "\n\n@hookimpl\ndef kdkit_run_finished(event):\n    raise ValueError('deaf')\n"
        )
    result = kdkit.run(project.recipe(project.one), inline=True)
    assert result.ok
    assert (result.run_dir / "told-a-ok").exists()
    assert any("deaf" in str(event.get("message")) for event in events(result))


def test_a_stage_prints_to_stderr_when_it_runs_in_the_parent(project, capsys):
    kdkit.run(project.recipe("  a: {kind: sheet}"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a stage's print" in captured.err


def test_the_parent_never_imports_torch(project):
    project.recipe(project.chain)
    code = "import kdkit, sys; r = kdkit.run('recipe.yaml'); print(r.ok, 'torch' in sys.modules)"
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout == "True False\n"


def test_build_makes_any_component():
    loss = kdkit.build("loss", "forward-kl", temperature=2.0)
    assert callable(loss)
    with pytest.raises(RecipeError, match="temperature"):
        kdkit.build("loss", "forward-kl", temperature=-1.0)
    with pytest.raises(RecipeError, match="stage cannot be built alone"):
        kdkit.build("stage", "sft")

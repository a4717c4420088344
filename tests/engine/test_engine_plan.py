from __future__ import annotations

import pytest

import kdkit
from kdkit.api import RecipeError
from kdkit.engine.selection import Selection


def states(plan):
    return {stage.name: (stage.state, stage.why) for stage in plan.stages}


def test_everything_runs_the_first_time(project):
    assert states(project.plan()) == dict.fromkeys("abc", ("run", "never ran"))


def test_everything_is_cached_after_a_run(project):
    kdkit.run(project.recipe(), inline=True)
    assert {state for state, _ in states(project.plan()).values()} == {"cached"}


def test_a_change_is_named_with_both_values(project):
    kdkit.run(project.recipe(), inline=True)
    plan = project.plan(kdkit_stages(steps=3), "stages.a.learning_rate=2e-5")
    assert states(plan)["a"] == ("run", "learning_rate 1e-05 -> 2e-05")
    assert states(plan)["b"] == ("run", "input source changed")


def kdkit_stages(steps):
    return f"""\
  a: {{kind: count, steps: {steps}}}
  b: {{kind: count, steps: 2, source: "${{stages.a.data}}"}}"""


def test_many_changes_are_counted(project):
    kdkit.run(project.recipe("  a: {kind: count}"), inline=True)
    changed = "  a: {kind: count, steps: 9, learning_rate: 1.0, shade: light, nested: {depth: 5}}"
    assert states(project.plan(changed))["a"][1].endswith(" and 1 more")


def test_another_stage_of_the_same_kind_is_no_history(project):
    kdkit.run(project.recipe("  a: {kind: count}"), inline=True)
    assert states(project.plan("  z: {kind: count, steps: 9}"))["z"] == ("run", "never ran")


def test_a_removed_result_is_said(project):
    kdkit.run(project.recipe("  a: {kind: count}"), inline=True)
    result = kdkit.run(project.recipe("  a: {kind: count, steps: 5}"), inline=True)
    project.store.discard(result.stage("a").entry)
    kdkit.run(project.recipe("  a: {kind: count}"), inline=True)
    assert states(project.plan("  a: {kind: count, steps: 5}"))["a"] == ("run", "steps 3 -> 5")


def test_damage_is_a_state_with_the_file(project):
    result = kdkit.run(project.recipe("  a: {kind: count}"), inline=True)
    (result.stage("a").entry / "data.jsonl").write_text("")
    state, why = states(project.plan("  a: {kind: count}"))["a"]
    assert state == "damaged"
    assert why.startswith("data.jsonl has 0 bytes instead of")


def test_a_checkpoint_is_resumed_and_fresh_throws_it_away(project):
    assert not kdkit.run(project.recipe("  a: {kind: count, fault: 'raise:3'}"), inline=True).ok
    assert states(project.plan("  a: {kind: count}"))["a"] == ("resume", "checkpoint step-000002")
    plan = project.plan("  a: {kind: count}", selection=Selection(fresh=True))
    assert states(plan)["a"] == ("run", "from the start, checkpoints thrown away")


def test_a_plan_writes_no_run_and_no_entry(project):
    project.plan()
    assert project.entries() == []
    assert not (project.root / "runs").exists()


def test_forcing_runs_a_cached_stage(project):
    kdkit.run(project.recipe(), inline=True)
    plan = project.plan(selection=Selection(force=("b",)))
    assert states(plan)["b"] == ("run", "forced")
    assert states(plan)["c"] == ("cached", "unless what it reads comes out different")


FORK = """\
  a: {kind: count}
  b: {kind: count, steps: 2, source: "${stages.a.data}"}
  c: {kind: count, steps: 1, source: "${stages.b.data}"}
  d: {kind: count, steps: 5, source: "${stages.a.data}"}"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "abcd"),
        ({"first": "b"}, "bc"),
        ({"until": "b"}, "ab"),
        ({"only": ("d",)}, "d"),
        ({"first": "b", "until": "b"}, "b"),
    ],
)
def test_selections(project, options, expected):
    stages = project.load(FORK).stages
    assert "".join(sorted(Selection(**options).stages(stages))) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": "bb"}, r"--from: no stage 'bb'; allowed: a, b, c, d; did you mean 'b'\?"),
        ({"only": ("q",)}, "--only: no stage 'q'"),
        ({"force": ("q",)}, "--force: no stage 'q'"),
        ({"first": "c", "until": "b"}, "no stage is left"),
        ({"only": ("a",), "force": ("b",)}, "stage 'b' is forced but left out"),
    ],
)
def test_wrong_selections_are_refused(project, options, message):
    with pytest.raises(RecipeError, match=message):
        project.plan(FORK, selection=Selection(**options))


def test_a_selection_that_lacks_an_input_is_refused(project):
    with pytest.raises(RecipeError, match="stage 'b' needs stage 'a', which is left out"):
        project.plan(FORK, selection=Selection(first="b"))
    kdkit.run(project.recipe(FORK), only=("a",), inline=True)
    assert states(project.plan(FORK, selection=Selection(first="b")))["a"][0] == "cached"

from __future__ import annotations

import pytest

from kdkit.api import DataError, Params, PluginError
from kdkit.engine.hashing import HashMemo
from kdkit.engine.inputs import Inputs
from kdkit.engine.keys import KeyMaker, differences
from kdkit.engine.plan import make_plan
from kdkit.testing.tiny import save_tiny_model


def keys(plan):
    return {stage.name: stage.key for stage in plan.stages}


BASE = "  a: {kind: count, steps: 3, nested: {depth: 2}, table: {x: 1.0, y: 2.0}}"


def test_a_key_is_twelve_hex_digits_and_stable(project):
    first = project.plan(BASE).stage("a").key
    assert len(first) == 12
    assert int(first, 16) >= 0
    assert project.plan(BASE).stage("a").key == first


@pytest.mark.parametrize(
    "same",
    [
        "  a: {kind: count, steps: 3, table: {y: 2.0, x: 1.0}, nested: {depth: 2}}",
        "  a: {kind: count, steps: 3, nested: {depth: 2, chatty: true}, table: {x: 1, y: 2}}",
        "  a: {kind: count, steps: 3, nested: {depth: 2}, table: {x: 1.0, y: 2.0}, seconds: 9.0, fault: 'kill:1'}",
        "  a: {kind: count, steps: 3, nested: {depth: 2}, table: {x: 1.0, y: 2.0}, learning_rate: 1e-5, shade: dark}",
        "  renamed: {kind: count, steps: 3, nested: {depth: 2}, table: {x: 1.0, y: 2.0}}",
    ],
    ids=["order", "runtime-nested-and-int", "runtime", "defaults", "stage-name"],
)
def test_what_changes_no_result_changes_no_key(project, same):
    (expected,) = keys(project.plan(BASE)).values()
    assert list(keys(project.plan(same)).values()) == [expected]


@pytest.mark.parametrize(
    "other",
    [
        "  a: {kind: count, steps: 4, nested: {depth: 2}, table: {x: 1.0, y: 2.0}}",
        "  a: {kind: count, steps: 3, nested: {depth: 3}, table: {x: 1.0, y: 2.0}}",
        "  a: {kind: count, steps: 3, nested: {depth: 2}, table: {x: 1.0, y: 3.0}}",
        "  a: {kind: count, steps: 3, nested: {depth: 2}, table: {x: 1.0, y: 2.0}, shade: light}",
        "  a: {kind: count, steps: 3, nested: {depth: 2}, table: {x: 1.0, y: 2.0}, metric: {use: one}}",
    ],
)
def test_what_changes_a_result_changes_the_key(project, other):
    assert keys(project.plan(BASE)) != keys(project.plan(other))


def test_the_seed_is_part_of_the_key(project):
    assert keys(project.plan(BASE)) != keys(project.plan(BASE, seed=4))


def test_the_recipes_name_counts_only_where_the_result_holds_it(project):
    stages = "  a: {kind: count}\n  b: {kind: sheet}"
    one, two = keys(project.plan(stages, name="one")), keys(project.plan(stages, name="two"))
    assert one["a"] == two["a"]
    assert one["b"] != two["b"]


def test_parameters_of_nested_components_and_their_weight_count(project):
    stages = "  a: {{kind: count, data: [{{use: few, rows: {rows}, weight: {weight}}}]}}"
    found = {
        project.plan(stages.format(rows=rows, weight=weight)).stage("a").key
        for rows, weight in ((2, 1.0), (3, 1.0), (2, 0.5))
    }
    assert len(found) == 3


def test_the_code_of_a_plugin_file_is_part_of_the_key(project):
    before = keys(project.plan(BASE))
    with (project.root / "fake_stages.py").open("a") as stream:
        stream.write("\n# another version\n")
    assert keys(project.plan(BASE)) != before


def test_the_resolved_precision_is_part_of_the_key(project, monkeypatch):
    found = {}
    for precision in ("bf16", "fp32"):
        monkeypatch.setattr("kdkit.engine.plan.resolve_precision", lambda _, answer=precision: answer)
        found[precision] = project.plan(BASE).stage("a").key
        written = project.plan(BASE, f"stages.a.precision={precision}").stage("a").key
        assert written == found[precision]
    assert found["bf16"] != found["fp32"]


def test_a_change_reaches_everything_downstream_and_nothing_else(project):
    stages = """\
  a: {kind: count, steps: 3}
  b: {kind: count, steps: 2, source: "${stages.a.data}"}
  other: {kind: count, steps: 5}"""
    before = keys(project.plan(stages))
    after = keys(project.plan(stages, "stages.a.steps=4"))
    assert before["other"] == after["other"]
    assert before["a"] != after["a"]
    assert before["b"] != after["b"]


def test_a_file_counts_by_content_and_not_by_place(project):
    for name, text in (("one.jsonl", "x"), ("two.jsonl", "x"), ("three.jsonl", "y"), ("one.csv", "x")):
        (project.root / name).write_text(text)
    stages = "  a: {{kind: count, source: ./{name}}}"
    found = {name: project.plan(stages.format(name=f"{name}")).stage("a").key for name in ("one.jsonl", "two.jsonl")}
    assert found["one.jsonl"] == found["two.jsonl"]
    assert project.plan(stages.format(name="three.jsonl")).stage("a").key != found["one.jsonl"]
    assert project.plan(stages.format(name="one.csv")).stage("a").key != found["one.jsonl"]


def test_a_directory_counts_by_names_and_contents(project):
    (project.root / "data").mkdir()
    (project.root / "data/a.jsonl").write_text("x")
    stages = "  a: {kind: count, source: ./data}"
    before = project.plan(stages).stage("a").key
    (project.root / "data/a.jsonl").rename(project.root / "data/b.jsonl")
    assert project.plan(stages).stage("a").key != before


def test_a_path_parameter_counts_by_content(project):
    (project.root / "t.jinja").write_text("one")
    before = project.plan("  a: {kind: count, template: t.jinja}").stage("a").key
    (project.root / "t.jinja").write_text("two")
    assert project.plan("  a: {kind: count, template: t.jinja}").stage("a").key != before


def test_a_missing_input_names_file_and_line(project):
    (project.root / "rows.jsonl").write_text("x")
    recipe = project.load("  a: {kind: count, source: ./rows.jsonl}")
    (project.root / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"recipe\.yaml:7:28: source: .*rows\.jsonl: no such file"):
        make_plan(recipe, project.store)


def test_models_count_by_weights_and_by_what_is_kept_of_them(project):
    for name, seed in (("m", 0), ("same", 0), ("other", 1)):
        save_tiny_model(project.root / name, seed=seed)
    stage = "  a: {{kind: evaluate, models: {{m: {model}}}, data: {{use: few}}, metrics: [{{use: one}}]}}"
    found = {
        text: project.plan(stage.format(model=text)).stage("a").key
        for text in ("./m", "./same", "./other", "{from: ./m, keep_layers: 1}", "{from: ./m}")
    }
    assert found["./m"] == found["./same"] == found["{from: ./m}"]
    assert len({found["./m"], found["./other"], found["{from: ./m, keep_layers: 1}"]}) == 3


def test_values_without_identity_are_refused(project, tmp_path):
    class Odd(Params):
        thing: object

    memo = HashMemo(tmp_path / "memo.json")
    maker = KeyMaker(Inputs(tmp_path, memo), memo, tmp_path, "fp32")
    with pytest.raises(PluginError, match="thing is a object"):
        maker.key({}, Odd(thing=object()), {}, lambda loc: ("", 0, 0))


def test_differences_are_phrases():
    old = {"stage": "x v1", "learning_rate": 1e-05, "model": "input:1", "gone": 1}
    new = {"stage": "x v1", "learning_rate": 2e-05, "model": "input:2", "more": True}
    assert differences(old, new) == [
        "learning_rate 1e-05 -> 2e-05",
        "input model changed",
        "more (not set) -> True",
        "gone 1 -> (not set)",
    ]

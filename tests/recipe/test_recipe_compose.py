from __future__ import annotations

import itertools

import pytest

HEAD = "kdkit: 1\nname: test\n"
STAGE = "stages: {t: {kind: train, model: ./model, data: {use: rows}}}\n"


def test_extends_merges_mappings_and_replaces_the_rest(desk):
    desk.write(
        "base.yaml",
        HEAD
        + "seed: 5\nstages:\n  t: {kind: train, model: ./model, data: [{use: rows}, {use: rows}], max_steps: 7, "
        + "sampling: {do_sample: true, top_k: 3, top_p: 0.5}}\n",
    )
    recipe = desk.good(
        "extends: base.yaml\nname: child\nstages: {t: {max_steps: 8, data: [{use: rows}], sampling: {top_k: 4}}}"
    )
    assert (recipe.name, recipe.seed) == ("child", 5)
    assert recipe.data["stages"]["t"] == {
        "kind": "train",
        "model": "./model",
        "data": [{"use": "rows"}],
        "max_steps": 8,
        "sampling": {"do_sample": True, "top_k": 4, "top_p": 0.5},
    }
    assert "extends" not in recipe.data


def test_another_component_does_not_inherit_parameters(desk):
    desk.write(
        "base.yaml",
        HEAD + "stages: {t: {kind: train, model: ./model, data: {use: rows}, losses: {use: soft-kl, "
        "temperature: 2.0}}, m: {kind: train, model: ./model}}",
    )
    recipe = desk.good("extends: base.yaml\nstages: {t: {losses: {use: hard}}, m: {kind: make}}")
    assert recipe.data["stages"]["t"]["losses"] == {"use": "hard"}
    assert recipe.data["stages"]["m"] == {"kind": "make"}


def test_problems_point_into_the_file_that_wrote_the_value(desk):
    desk.write("lib/base.yaml", HEAD + "stages:\n  t: {kind: train, model: ./model, data: {use: rows}, max_step: 3}\n")
    assert desk.problems("extends: lib/base.yaml\nstages:\n  t:\n    learning_rate: fast\n") == [
        "r.yaml:4:20: stages.t.learning_rate: wants a number, got the string 'fast'",
        f"lib/base.yaml:4:27: stages.t.model: no such directory: {desk.path}/lib/model",
        "lib/base.yaml:4:55: stages.t.max_step: unknown key 'max_step'; did you mean 'max_steps'?",
    ]


def test_paths_of_an_extended_file_stay_relative_to_that_file(desk):
    (desk.path / "lib/own").mkdir(parents=True)
    desk.write(
        "lib/base.yaml", HEAD + "vars: {m: ./own}\nstages: {t: {kind: train, model: '${vars.m}', data: {use: rows}}}"
    )
    recipe = desk.good("extends: lib/base.yaml\nstages: {u: {kind: train, model: ./model, data: {use: rows}}}")
    assert str(recipe.stages["t"].params.model) == str(desk.path / "lib/own")
    assert str(recipe.stages["u"].params.model) == "./model"
    assert recipe.base_dir == desk.path


def test_a_chain_of_extended_files(desk):
    desk.write("a.yaml", HEAD + STAGE + "seed: 1")
    desk.write("b.yaml", "extends: a.yaml\nseed: 2")
    assert desk.good("extends: ./b.yaml\nname: c").seed == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "r.yaml:1:10: extends: no such file: base.yaml"),
        (
            {"base.yaml": "extends: r.yaml"},
            "base.yaml:1:10: extends: recipes extend each other in a cycle: r.yaml -> base.yaml -> r.yaml",
        ),
        (
            {"base.yaml": "extends: ./base.yaml"},
            "base.yaml:1:10: extends: recipes extend each other in a cycle: base.yaml -> base.yaml",
        ),
        ({"base.yaml": "extends: [a.yaml]"}, "base.yaml:1:10: extends: wants the path of one recipe file, got a list"),
        ({"base.yaml": "extends: ${vars.x}"}, "base.yaml:1:10: extends: variables cannot be used here; write the path"),
        ({"base.yaml": "- 1"}, "base.yaml:1:1: a recipe is a mapping, got a list; start with kdkit: 1"),
        (
            {"base.yaml": "a: b: c"},
            "base.yaml:1:5: not valid YAML: a ':' is not allowed here; check the indentation, or quote the text",
        ),
    ],
)
def test_refused_extends(desk, files, expected):
    for name, text in files.items():
        desk.write(name, text)
    assert desk.problems("extends: base.yaml") == [expected]


def test_a_long_chain_is_refused(desk):
    for i in range(20):
        desk.write(f"f{i}.yaml", f"extends: f{i + 1}.yaml")
    assert desk.problems("extends: f0.yaml") == ["f6.yaml:1:10: extends: more than 8 files extend one another"]


def test_the_format_of_an_extended_file_counts_when_it_alone_says_it(desk):
    desk.write("base.yaml", "kdkit: 2\nname: x\n" + STAGE)
    assert desk.problems("extends: base.yaml") == [
        "base.yaml:1:8: kdkit: recipe format 2 is not known; this version reads kdkit: 1"
    ]


def test_variables_are_whole_values_of_any_type_anywhere(desk):
    recipe = desk.good(
        HEAD
        + "vars: {m: ./model, n: 5, d: {use: rows, split: '${vars.s}'}, s: test, r: '${stages.a.model}'}\n"
        + "stages:\n"
        + "  a: {kind: make}\n"
        + '  t: {kind: train, model: "${vars.r}", max_steps: "${vars.n}", data: ["${vars.d}", {use: rows}]}\n'
        + "  u: {kind: train, model: '${vars.m}', data: '${vars.d}'}\n"
    )
    assert recipe.data["stages"]["t"]["data"] == [{"use": "rows", "split": "test"}, {"use": "rows"}]
    assert recipe.stages["t"].params.max_steps == 5
    assert recipe.stages["t"].upstream == ("a",)
    assert "vars" not in recipe.data


def test_var_replaces_a_declared_variable(desk):
    text = HEAD + "vars: {n: 5}\nstages: {t: {kind: train, model: ./model, data: {use: rows}, max_steps: '${vars.n}'}}"
    assert desk.good(text, variables=["n=1", "n=6"]).stages["t"].params.max_steps == 6
    assert desk.problems(text, variables=["n='6'"]) == [
        "--var #1: stages.t.max_steps: wants a whole number, got the string '6'; write 6"
    ]


@pytest.mark.parametrize(
    ("text", "variables", "expected"),
    [
        ("vars: {student: a/b}\n", ["studnet=c/d"], "--var #1: no variable 'studnet'; did you mean 'student'?"),
        ("", ["x=1"], "--var #1: no variable 'x'; the recipe has no vars:"),
        ("vars: {a: 1, b: 2}\n", ["zzz=1"], "--var #1: no variable 'zzz'; variables: a, b"),
        ("vars: {a: 1}\n", ["a"], "--var #1: wants NAME=VALUE, got the string 'a'"),
        (
            "vars: {a: 1}\n",
            ["a=[1"],
            (
                "--var #1: not valid YAML: in the [ that opens at line 1, column 1: expected ',' or ']', "
                "but got the end of the file"
            ),
        ),
        ("vars: {a: '${vars.b}', b: '${vars.a}'}\n", [], "r.yaml:3:27: vars.b: variables form a cycle: a -> b -> a"),
        ("vars: {a: ['${vars.a}']}\n", [], "r.yaml:3:12: vars.a.0: variables form a cycle: a -> a"),
        ("vars: {1x: 2}\n", [], "r.yaml:3:8: vars.1x: a variable's name is letters, digits, - and _, got '1x'"),
        ("vars: [a]\n", [], "r.yaml:3:7: vars: wants a mapping of names to values, got a list"),
    ],
)
def test_refused_variables(desk, text, variables, expected):
    assert desk.problems(HEAD + text + STAGE, variables=variables) == [expected]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "a-${vars.x}",
            "a reference must be the whole value, got the string 'a-${vars.x}'; put the full text into one variable",
        ),
        ("${vars.x}${vars.x}", "a reference must be the whole value"),
        ("${stages.a.model}/x", "a reference must be the whole value"),
        (
            "${env.HOME}",
            "environment variables are not read, got the string '${env.HOME}'; pass the value with --var NAME=VALUE",
        ),
        ("${stages.a}", "a stage's output is written ${stages.NAME.OUTPUT}, got the string '${stages.a}'"),
        ("${x}", "the only references are ${vars.NAME} or ${stages.NAME.OUTPUT}, got the string '${x}'"),
        ("${vars.x", "the only references are"),
        ("${vars.y}", "no variable 'y'; variables: x"),
    ],
)
def test_refused_references(desk, value, message):
    text = HEAD + "vars: {x: 1}\nstages: {t: {kind: train, model: ./model, data: {use: rows}, note: '" + value + "'}}"
    (problem,) = desk.problems(text)
    assert problem.startswith("r.yaml:4:68: stages.t.note: ")
    assert message in problem


def test_a_broken_variable_is_reported_once_however_often_it_is_used(desk):
    text = (
        HEAD
        + "vars: {x: '${env.A}'}\n"
        + "stages: {t: {kind: train, model: '${vars.x}', data: '${vars.x}', max_steps: '${vars.x}'}}"
    )
    assert len(desk.problems(text)) == 1


def test_a_variable_bomb_is_refused(desk):
    names = [f"v{i}" for i in range(12)]
    ten = {name: ", ".join([f"'${{vars.{name}}}'"] * 10) for name in names}
    bomb = ", ".join(f"{a}: [{ten[b]}]" for a, b in itertools.pairwise(names))
    found = desk.problems(HEAD + "vars: {" + bomb + ", v11: 1}\n" + STAGE)
    assert found
    assert all("more than 100,000 values" in line for line in found)


def test_a_long_chain_of_nested_variables_is_refused(desk):
    deep = ", ".join(f"v{i}: {'[' * 30}'${{vars.v{i + 1}}}'{']' * 30}" for i in range(300))
    found = desk.problems(HEAD + "vars: {" + deep + ", v300: 1}\n" + STAGE)
    assert found
    assert all("64 levels" in line for line in found)


def test_set_changes_makes_and_indexes(desk):
    text = HEAD + "stages: {t: {kind: train, model: ./model, data: [{use: rows}], losses: {use: soft-kl}}}"
    recipe = desk.good(
        text,
        sets=[
            "stages.t.max_steps=50",
            "stages.t.sampling.do_sample=true",
            "stages.t.sampling.top_k=3",
            "stages.t.data.0.split=test",
            "stages.t.losses.temperature=2",
            "stages.t.losses.0.weight=1e-1",
            "seed=3",
            "stages.t.tags=[a, 'b']",
        ],
    )
    params = recipe.stages["t"].params
    assert (params.max_steps, params.sampling.top_k, params.data[0].params.split, recipe.seed) == (50, 3, "test", 3)
    assert (params.losses[0].params.temperature, params.losses[0].weight, params.tags) == (2.0, 0.1, ["a", "b"])


def test_overrides_cannot_nest_deeper_than_recipes(desk):
    deep = "stages.t." + ".".join("a" * 25) + "=" + "[" * 50 + "]" * 50
    assert desk.problems(HEAD + STAGE, sets=[deep]) == [
        "r.yaml:1:1: more than 100,000 values or 64 levels once variables are expanded"
    ]


def test_set_wins_over_var_and_may_use_variables(desk):
    text = (
        HEAD
        + "vars: {n: 1, k: 4}\nstages: {t: {kind: train, model: ./model, data: {use: rows}, max_steps: '${vars.n}'}}"
    )
    params = desk.good(text, variables=["n=2"], sets=["stages.t.max_steps=${vars.k}"]).stages["t"].params
    assert params.max_steps == 4


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("stages.t.max_step=5", "--set #1: stages.t.max_step: unknown key 'max_step'; did you mean 'max_steps'?"),
        ("stages.tt.max_steps=5", "--set #1: stages.tt.max_steps: no stage 'tt'; did you mean 't'?"),
        ("stages.t.max_steps=many", "--set #1: stages.t.max_steps: wants a whole number, got the string 'many'"),
        ("stages.t.sampling.top=1", "--set #1: stages.t.sampling.top: unknown key 'top'; did you mean 'top_p'?"),
        ("stages.t.data.0.split=x", "--set #1: stages.t.data.0.split: wants 'train' or 'test', got the string 'x'"),
        ("stages.t.data.3.split=x", "--set #1: stages.t.data.3.split: stages.t.data has no index '3'; allowed: 0 to 0"),
        (
            "stages.t.data.-1.split=x",
            "--set #1: stages.t.data.-1.split: stages.t.data has no index '-1'; allowed: 0 to 0",
        ),
        (
            "stages.t.model.x=1",
            "--set #1: stages.t.model.x: stages.t.model is the string './model', which has no key 'x'",
        ),
        ("vars.x=1", "--set #1: vars.x: set a variable with --var NAME=VALUE"),
        ("extends=x", "--set #1: extends: cannot be overridden"),
        ("sede=1", "--set #1: sede: unknown key 'sede'; did you mean 'seed'?"),
        ("stages..x=1", "--set #1: stages..x: is not a path of keys joined by dots"),
        ("seed", "--set #1: wants PATH=VALUE, such as stages.kd.max_steps=50, got the string 'seed'"),
        ("seed=.inf", "--set #1: .inf is not allowed; write a finite number"),
        ("name=${vars.x}", "--set #1: name: no variable 'x'; the recipe has no vars:"),
        ("stages.t.max_steps=1=2", "--set #1: stages.t.max_steps: wants a whole number, got the string '1=2'"),
    ],
)
def test_refused_overrides(desk, option, expected):
    text = HEAD + "stages: {t: {kind: train, model: ./model, data: [{use: rows}]}}"
    assert desk.problems(text, sets=[option]) == [expected]


def test_options_are_numbered_and_come_after_the_file(desk):
    text = HEAD + "seed: x\nstages: {t: {kind: train, model: ./model, data: {use: rows}}}"
    found = desk.problems(text, sets=["seed=y", "stages.t.bits=none", "stages.t.bitz=1"], variables=["v=1"])
    assert [line.split(": ")[0] for line in found] == ["--set #1", "--set #3", "--var #1"]


def test_paths_on_the_command_line_are_relative_to_the_working_directory(desk, monkeypatch):
    (desk.path / "here/other").mkdir(parents=True)
    (desk.path / "home/kept").mkdir(parents=True)
    text = HEAD + "vars: {m: ./model}\nstages: {t: {kind: train, model: '${vars.m}', data: {use: rows}}}"
    desk.write("r.yaml", text)
    monkeypatch.chdir(desk.path / "here")
    monkeypatch.setenv("HOME", str(desk.path / "home"))
    from pretend_plugins import PretendCatalog

    from kdkit.recipe import load_recipe

    def model(**options):
        from pathlib import Path

        return str(load_recipe(Path("../r.yaml"), catalog=PretendCatalog(), **options).stages["t"].params.model)

    assert model() == "./model"
    assert model(variables=["m=./other"]) == str(desk.path / "here/other")
    assert model(sets=["stages.t.model=../here/other"]) == str(desk.path / "here/other")
    assert model(variables=["m=~/kept"]) == str(desk.path / "home/kept")
    assert model(variables=["m=org/name"]) == "org/name"

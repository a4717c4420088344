from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pretend_plugins import PretendCatalog

from kdkit.api import ExitCode, RecipeError
from kdkit.recipe import check_recipe, exit_code, load_recipe

HEAD = "kdkit: 1\nname: test\n"
STAGE = "stages: {t: {kind: train, model: ./model, data: {use: rows}}}\n"
GOOD = """\
kdkit: 1
name: all-of.it_2
seed: 3
requires: [kdkit>=0.1]
plugins: [./mine.py]
stages:
  table: {kind: table, scores: ["${stages.score.scores}"], extra: {use: rows}}
  b:
    kind: train
    model: "${stages.a.model}"
    data: {use: rows, weight: 2}
    losses: [{use: mine}, {use: kdkit/soft-kl, weight: 0.5}]
  a:
    kind: kdkit/make
  score:
    kind: score
    models: {small: "${stages.b.model}", big: {from: ./model, keep_layers: every-2nd}, hub: org/name_1.5-B}
    data: {use: rows, source: "${stages.a.data}"}
track: [{use: jsonl}, {use: board, temperature: 2}]
"""


def test_a_good_recipe(desk):
    desk.write("mine.py", "")
    recipe = desk.good(GOOD)
    assert (recipe.name, recipe.seed, recipe.requires) == ("all-of.it_2", 3, ("kdkit>=0.1",))
    assert list(recipe.stages) == ["a", "b", "score", "table"]
    assert recipe.stages["score"].upstream == ("b", "a")
    assert recipe.stages["b"].kind == "train"
    assert recipe.stages["a"].found.qualified_name == "kdkit/make"
    assert [tracker.name for tracker in recipe.track] == ["jsonl", "board"]
    assert [(loss.name, loss.weight) for loss in recipe.stages["b"].params.losses] == [("mine", 1.0), ("soft-kl", 0.5)]
    assert recipe.catalog.files == (desk.path / "mine.py",)
    assert (recipe.path, recipe.base_dir) == (Path("r.yaml"), desk.path)


def test_defaults(desk):
    recipe = desk.good(HEAD + STAGE)
    assert recipe.seed == 17
    assert [tracker.name for tracker in recipe.track] == ["jsonl"]
    assert desk.good(HEAD + STAGE + "track: []").track == ()
    assert [t.name for t in desk.good(HEAD + STAGE + "track: {use: board}").track] == ["board"]


def test_locate_gives_the_place_of_a_parameter(desk):
    locate = desk.good(GOOD.replace("plugins: [./mine.py]", "").replace("mine}", "hard}")).stages["b"].locate
    assert locate(("losses", 1, "weight")) == ("r.yaml", 12, 56)
    assert locate(("data", 0, "use")) == ("r.yaml", 11, 17)
    assert locate(("max_steps",)) == ("r.yaml", 9, 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\n" + STAGE, ["1:1: kdkit: missing key 'kdkit'; write kdkit: 1"]),
        ("kdkit: 2\nname: x\n" + STAGE, ["1:8: kdkit: recipe format 2 is not known; this version reads kdkit: 1"]),
        ("kdkit: '1'\nname: x\n" + STAGE, ["1:8: kdkit: wants 1 (the recipe format), got the string '1'"]),
        ("kdkit: true\nname: x\n" + STAGE, ["1:8: kdkit: wants 1 (the recipe format), got true"]),
        ("kdkit: 1\n" + STAGE, ["1:1: name: missing key 'name'"]),
        (HEAD, ["1:1: stages: missing key 'stages'"]),
        (HEAD + "stages: {}", ["3:9: stages: wants at least one stage such as sft: {kind: sft, ...}, got none"]),
        (HEAD + "stages: [a]", ["3:9: stages: wants at least one stage such as sft: {kind: sft, ...}, got a list"]),
        (HEAD + "stages:\n  a: 3", ["4:6: stages.a: wants a mapping such as {kind: sft, ...}, got the number 3"]),
        (
            HEAD + "stages:\n  1a: {kind: make}",
            ["4:3: stages.1a: a stage's name is letters, digits, - and _, and starts with a letter; got '1a'"],
        ),
        (HEAD + "seed: -1\n" + STAGE, ["3:7: seed: wants a whole number from 0, got the number -1"]),
        (HEAD + "seed: true\n" + STAGE, ["3:7: seed: wants a whole number from 0, got true"]),
        (HEAD + "stage: 1\n" + STAGE, ["3:1: stage: unknown key 'stage'; did you mean 'stages'?"]),
        (
            HEAD + "requires: kdkit\n" + STAGE,
            ["3:11: requires: wants a list of requirements such as kdkit-acme>=0.2, got the string 'kdkit'"],
        ),
        (
            HEAD + "plugins: [1]\n" + STAGE,
            ["3:11: plugins.0: wants text, one of the paths such as ./losses.py, got the number 1"],
        ),
        (HEAD + "track: 3\n" + STAGE, ["3:8: track: wants a list, got the number 3"]),
        (
            HEAD + "track: [{use: jsonl, temperature: 1}]\n" + STAGE,
            ["3:22: track.0.temperature: unknown key 'temperature'; did you mean 'use'?"],
        ),
        (
            HEAD + "seed: ${stages.t.model}\n" + STAGE,
            ["3:7: seed: wants a whole number from 0 and no stage's output, got the string '${stages.t.model}'"],
        ),
        ("[]", ["1:1: a recipe is a mapping, got a list; start with kdkit: 1"]),
        ("", ["1:1: the file is empty; start with kdkit: 1"]),
    ],
)
def test_top_level(desk, text, expected):
    found = [
        line.removeprefix("r.yaml:").replace("; allowed: use", "; did you mean 'use'?") for line in desk.problems(text)
    ]
    assert found == expected


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "-x", "a" * 65, "a b", "ä", "a\\n", "1e5"])
def test_refused_names(desk, name):
    problems = desk.problems(f'kdkit: 1\nname: "{name}"\n' + STAGE)
    assert problems == [] if name == "1e5" else len(problems) == 1 and ":2:7: name: wants a name" in problems[0]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("model: ./model", "4:6: stages.t.kind: missing key 'kind'; allowed: make, score, table, train, wide"),
        ("kind: 3", "4:13: stages.t.kind: wants the name of a stage kind, got the number 3"),
        ("kind: trian", "4:13: stages.t.kind: no stage 'trian'"),
        ("kind: make, x: 1", "4:19: stages.t.x: unknown key 'x'; allowed: kind"),
        ("kind: make, knid: 1", "4:19: stages.t.knid: unknown key 'knid'; did you mean 'kind'?"),
    ],
)
def test_kinds(stages, stage, expected):
    assert stages("  t: {" + stage + "}") == [expected]


# One parameter each; the value starts in column 5 of line 6.
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("learning_rate", "'1'", "wants a number, got the string '1'; write 1"),
        ("learning_rate", "1_0.5", "wants a number, got the string '1_0.5'; write 10.5"),
        ("learning_rate", "0", "must be greater than 0, got the number 0"),
        ("learning_rate", "true", "wants a number, got true"),
        ("learning_rate", "null", "wants a number, got null"),
        ("max_steps", "1.5", "wants a whole number, got the number 1.5"),
        ("max_steps", "0", "must be at least 1, got the number 0"),
        ("note", "5", "wants text, got the number 5"),
        ("bits", "atuo", "wants a whole number, 'auto' or 'none', got the string 'atuo'; did you mean 'auto'?"),
        ("bits", "[4]", "wants a whole number, 'auto' or 'none', got a list"),
        ("bits", "'4'", "wants a whole number, 'auto' or 'none', got the string '4'; write 4"),
        ("tags", "a", "wants a list, got the string 'a'"),
        ("tags", "[a, b, c]", "must have at most 2 entries, got 3"),
        ("sampling", "[1]", "wants a mapping, got a list"),
        ("losses", "soft-kl", "wants a list, got the string 'soft-kl'; write {use: soft-kl}"),
        ("losses", "[]", "must have at least 1 entries, got 0"),
        ("losses", "{temperature: 1}", "wants a loss such as {use: NAME}, got a mapping"),
        (
            "model",
            "5",
            (
                "wants a Hub id, a local path (./ ../ / ~) or ${stages.NAME.OUTPUT}, or {from: ..., keep_layers: ...}, "
                "got the number 5"
            ),
        ),
        ("note", "'" + "x" * 200 + "' ", None),
    ],
)
def test_values(stages, key, value, expected):
    required = "".join(f"    {k}: {v}\n" for k, v in {"model": "./model", "data": "{use: rows}"}.items() if k != key)
    found = stages(f"  t:\n    ? {key}\n    : {value}\n{required}    kind: train\n")
    assert found == ([f"6:7: stages.t.{key}: {expected}"] if expected else [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("losses: [{use: hard}, {use: sotf-kl}]", "losses.1.use: no loss 'sotf-kl'"),
        (
            "losses: [{use: hard}, soft-kl]",
            "losses.1: wants a loss such as {use: NAME}, got the string 'soft-kl'; write {use: soft-kl}",
        ),
        (
            "losses: {use: soft-kl, temprature: 1}",
            "losses.temprature: unknown key 'temprature'; did you mean 'temperature'?",
        ),
        ("losses: [{use: soft-kl, wieght: 1}]", "losses.0.wieght: unknown key 'wieght'; did you mean 'weight'?"),
        ("losses: {use: soft-kl, temperature: -1}", "losses.temperature: must be greater than 0, got the number -1"),
        ("losses: {use: soft-kl, weight: 0}", "losses.weight: must be greater than 0, got the number 0"),
        ("losses: {use: soft-kl, top_k: x}", "losses.top_k: wants a whole number or 'auto', got the string 'x'"),
        ("losses: {use: 3}", "losses: wants a loss such as {use: NAME}, got a mapping"),
        ("rewards: [{use: correctness}]", "rewards.0.sandbox: missing key 'sandbox'"),
        (
            "rewards: [{use: correctness, sandbox: {use: auto, x: 1}}]",
            "rewards.0.sandbox.x: unknown key 'x'; allowed: use",
        ),
        ("rewards: [{use: correctness, sandbox: {use: none}}]", "rewards.0.sandbox.use: no sandbox 'none'"),
        (
            "rewards: [{use: correctness, sandbox: {use: auto}, weight: 1, timeout_s: '5'}]",
            "rewards.0.timeout_s: wants a number, got the string '5'; write 5",
        ),
        ("sampling: {top_p: 2}", "sampling.top_p: must be at most 1, got the number 2"),
        ("sampling: {top_n: 2}", "sampling.top_n: unknown key 'top_n'; did you mean 'top_p'?"),
        ("max_steps: 13", ": 13 steps bring bad luck"),
        ("learning_rat: 1", "learning_rat: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("Max_Steps: 1", "Max_Steps: unknown key 'Max_Steps'; did you mean 'max_steps'?"),
        (
            "zzz: 1",
            (
                "zzz: unknown key 'zzz'; allowed: kind, model, data, losses, rewards, sampling, learning_rate, "
                "max_steps, bits, tags, note"
            ),
        ),
        ("note: hot, losses: {use: soft-kl}", "losses.temperature: is too hot"),
        ("note: hot", "losses.0.temperature: is too hot"),
    ],
)
def test_nested_places(stages, text, expected):
    (problem,) = stages(f"  t: {{kind: train, model: ./model, data: {{use: rows}}, {text}}}")
    place, _, message = problem.partition(": stages.t")
    assert message.removeprefix(".") == expected
    assert place.startswith("4:")


def test_a_long_list_of_keys_is_left_to_the_command_that_shows_them(stages):
    assert stages("  t: {kind: wide, zzz: 1}") == [
        "4:19: stages.t.zzz: unknown key 'zzz'; its keys: kdkit plugins show wide"
    ]


def test_key_and_value_positions(stages):
    assert stages(
        "  t:\n    kind: train\n    model: ./model\n    data: {use: rows}\n    max_step: 1\n    bits: x\n"
    ) == [
        "8:5: stages.t.max_step: unknown key 'max_step'; did you mean 'max_steps'?",
        "9:11: stages.t.bits: wants a whole number, 'auto' or 'none', got the string 'x'",
    ]


def test_a_missing_key_points_at_its_mapping(stages):
    assert stages("  t:\n    kind: train\n    data: {use: rows}\n") == ["5:5: stages.t.model: missing key 'model'"]
    assert stages("  t: {kind: train, data: {use: rows}}\n") == ["4:6: stages.t.model: missing key 'model'"]


def test_the_branch_of_a_union_that_was_meant_is_explained(stages):
    def extra(value):
        found = stages(f"  s: {{kind: table, scores: [./model], extra: {value}}}")
        return [line.partition(": ")[2] for line in found]

    assert extra("{use: rows, splt: x}") == ["stages.s.extra.splt: unknown key 'splt'; did you mean 'split'?"]
    assert extra("[{use: rows, split: x}]") == ["stages.s.extra.0.split: wants 'train' or 'test', got the string 'x'"]
    assert extra("5") == [
        "stages.s.extra: wants a Hub id, a local path (./ ../ / ~) or ${stages.NAME.OUTPUT} or a list, got the number 5"
    ]
    assert extra("org/data") == []


def test_one_component_for_a_mapping_of_them(stages):
    def data(value):
        return stages(f"  s: {{kind: score, models: {{a: ./model}}, data: {value}}}")

    assert data("{use: rows}") == data("{x: {use: rows}, y: {use: rows, split: test}}") == []
    assert data("{use: rows, splt: 1}") == ["4:60: stages.s.data.splt: unknown key 'splt'; did you mean 'split'?"]
    assert data("{x: {use: rows, splt: 1}}") == [
        "4:64: stages.s.data.x.splt: unknown key 'splt'; did you mean 'split'?"
    ]


def test_all_mistakes_at_once_in_the_order_of_the_file(desk):
    text = """\
kdkit: 1
name: bad name
sede: 1
stages:
  a: {kind: train, model: "${stages.c.model}", data: {use: rows}, max_steps: .inf, bits: 4, bits: 5}
  b:
    kind: trian
    model: "${stages.aa.model}"
  c:
    kind: train
    learning_rate: fast
    losses: [{use: hrad}, {use: soft-kl, temprature: 2}]
    model: ./nowhere
"""
    places = [(p.line, p.path) for p in desk.check(text).problems]
    assert places == [
        (2, "name"),
        (3, "sede"),
        (5, "stages.a.max_steps"),
        (5, "stages.a.bits"),
        (7, "stages.b.kind"),
        (8, "stages.b.model"),
        (10, "stages.c.data"),
        (11, "stages.c.learning_rate"),
        (12, "stages.c.losses.0.use"),
        (12, "stages.c.losses.1.temprature"),
        (13, "stages.c.model"),
    ]


def test_exit_codes(desk):
    def code(text):
        return exit_code(desk.check(HEAD + text + STAGE).problems)

    assert code("") is ExitCode.OK
    assert code("sede: 1\n") is ExitCode.INVALID
    assert code("requires: [acme>=1]\n") is ExitCode.PLUGIN
    assert code("requires: ['not a requirement']\n") is ExitCode.INVALID
    assert code("plugins: [./gone.py]\n") is ExitCode.PLUGIN
    assert code("track: [{use: broken}]\n") is ExitCode.PLUGIN
    assert code("track: [{use: broken}]\nsede: 1\n") is ExitCode.INVALID


def test_a_nested_component_of_a_broken_plugin_keeps_its_exit_code(desk):
    text = (
        HEAD
        + "stages: {t: {kind: train, model: ./model, data: {use: rows},\n"
        + " rewards: [{use: correctness, sandbox: {use: broken}}]}}"
    )
    (problem,) = desk.check(text).problems
    assert problem.exit_code is ExitCode.PLUGIN
    assert (problem.path, problem.column) == ("stages.t.rewards.0.sandbox.use", 46)


def test_names_that_a_missing_plugin_may_bring_are_not_reported(desk):
    stage = (
        "stages: {t: {kind: train, model: ./model, data: {use: rows}, losses: {use: gone}, bitz: 1}, u: {kind: gone}}"
    )
    assert [p.split(": ")[1] for p in desk.problems(HEAD + "requires: [acme]\n" + stage)] == [
        "requires.0",
        "stages.t.bitz",
    ]
    found = desk.problems(HEAD + "plugins: [./gone.py]\n" + stage.replace(", bitz: 1", ""))
    assert found == ["r.yaml:3:11: plugins.0: gone.py: cannot read the plugin file"]


def test_a_validator_that_crashes_names_its_plugin(desk):
    (problem,) = desk.check(HEAD + STAGE.replace("{use: rows}", "{use: rows}, note: crash")).problems
    assert problem.exit_code is ExitCode.PLUGIN
    assert "ZeroDivisionError" in problem.message
    assert "stage 'train'" in problem.message
    (problem,) = desk.check(HEAD + STAGE.replace("{use: rows}", "{use: rows}, note: bad check")).problems
    assert "RuntimeError: the check is broken" in problem.message
    assert problem.path == "stages.t.kind"


def test_load_recipe_raises_all_problems_with_the_exit_code(desk):
    desk.write("r.yaml", HEAD + "requires: [acme, bcme]\n" + STAGE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("r.yaml"), catalog=PretendCatalog())
    assert caught.value.exit_code is ExitCode.PLUGIN
    assert str(caught.value).splitlines() == [
        "r.yaml:3:12: requires.0: acme is not installed",
        "r.yaml:3:18: requires.1: bcme is not installed",
    ]
    desk.write("r.yaml", HEAD + "sede: 1\n" + STAGE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("r.yaml"), catalog=PretendCatalog())
    assert caught.value.exit_code is ExitCode.INVALID


PIECES = ["stages", "kind", "use", "train", "make", "${stages.a.model}", "${vars.x}", "0", "1e9", "null", "{}", "[]"]
PIECES += ["&a", "*a", "!x", "'", '"', ":", ", ", "{", "}", "\n", "  ", "- ", "\t", "\0", "./" + "x" * 300, "~"]
PIECES += ["extends: r.yaml\n", "<<: *a", "\ufeff", "\u2028", "%", "\\U00110000"]


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 12), st.sampled_from(PIECES)), min_size=1, max_size=4))
def test_whatever_a_recipe_says_the_answer_is_a_recipe_or_problems(tmp_path_factory, edits):
    text = GOOD.replace("plugins: [./mine.py]", "vars: {x: 1}")
    for place, length, piece in edits:
        text = text[:place] + piece + text[place + length :]
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "r.yaml").write_text(text)
    checked = check_recipe(directory / "r.yaml", catalog=PretendCatalog(), sets=["stages.b.bits=1"], variables=["x=2"])
    assert (checked.recipe is None) == bool(checked.problems)
    assert all(problem.message and "\n" not in str(problem) for problem in checked.problems)


def test_a_missing_file_is_one_problem(tmp_path):
    (problem,) = check_recipe(tmp_path / "no.yaml", catalog=PretendCatalog()).problems
    assert str(problem) == f"{tmp_path}/no.yaml: cannot read the recipe: no such file or directory"

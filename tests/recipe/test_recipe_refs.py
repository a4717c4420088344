from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdkit.recipe.refs import Draft, run_order

ROWS = "data: {use: rows}"


def test_reference_problems(stages):
    text = f"""\
  a: {{kind: make}}
  table: {{kind: table, scores: ["${{stages.a.model}}", "${{stages.score.scores}}", "${{stages.tabel.x}}"]}}
  b: {{kind: train, model: "${{stages.aa.model}}", {ROWS}}}
  c: {{kind: train, model: "${{stages.a.modle}}", {ROWS}}}
  d: {{kind: train, model: "${{stages.table.model}}", {ROWS}}}
  e: {{kind: train, model: "${{stages.a.data}}", {ROWS}}}
  f: {{kind: train, model: "${{stages.f.model}}", {ROWS}}}
  score:
    kind: score
    models: {{m: {{from: "${{stages.b.scores}}", keep_layers: 3}}}}
    data: {{x: {{use: rows, source: "${{stages.c.model}}"}}}}
"""
    assert [line.partition(" ")[2] for line in stages(text)] == [
        "stages.table.scores.0: wants scores, but ${stages.a.model} is a model",
        "stages.table.scores.2: no stage 'tabel'; stages: a, b, c, d, e, f, score",
        "stages.b.model: no stage 'aa'; did you mean 'a'?",
        "stages.c.model: stage 'a' has no output 'modle'; did you mean 'model'?",
        "stages.d.model: stage 'table' has no output 'model'; it has none",
        "stages.e.model: wants a model, but ${stages.a.data} is a dataset; did you mean ${stages.a.model}?",
        "stages.f.model: stage 'f' refers to itself",
        "stages.score.models.m.from: stage 'b' has no output 'scores'; it has model",
        "stages.score.data.x.source: wants a dataset, but ${stages.c.model} is a model",
    ]


def test_references_of_a_stage_with_other_mistakes_are_checked_too(stages):
    found = stages(
        "  a: {kind: make}\n"
        '  b: {kind: train, model: {from: "${stages.a.data}"}, data: [{use: rows, source: "${stages.x.y}"}], bits: x}\n'
        '  s: {kind: table, scores: ["${stages.a.data}", "./gone"], extra: ./gone, zzz: 1}\n'
        '  u: {kind: nothing, model: "${stages.bb.model}", other: ["${stages.a.nope}"]}\n'
    )
    paths = [line.split(": ")[1] for line in found]
    assert paths == [
        "stages.b.model.from",
        "stages.b.data.0.source",
        "stages.b.bits",
        "stages.s.scores.0",
        "stages.s.scores.1",
        "stages.s.extra",
        "stages.s.zzz",
        "stages.u.kind",
        "stages.u.model",
        "stages.u.other.0",
    ]


def test_references_to_broken_stages_bring_no_further_problems(stages):
    found = stages(
        "  a: {kind: nothing}\n  b: 3\n  c: {kind: make, x: 1}\n"
        '  t: {kind: table, scores: ["${stages.a.scores}", "${stages.b.scores}"], extra: "${stages.c.data}"}\n'
    )
    assert [line.split(": ")[1] for line in found] == ["stages.a.kind", "stages.b", "stages.c.x"]


def test_a_reference_where_plain_text_is_wanted(stages):
    found = stages(f'  a: {{kind: make}}\n  t: {{kind: train, model: ./model, {ROWS}, note: "${{stages.a.model}}"}}')
    assert found == ["5:61: stages.t.note: takes no stage's output, got ${stages.a.model}"]


def test_cycles_are_reported_once_each(stages):
    def train(name, model):
        return f'  {name}: {{kind: train, model: "${{stages.{model}.model}}", {ROWS}}}\n'

    found = stages(
        train("a", "b") + train("b", "c") + train("c", "a") + train("x", "y") + train("y", "x") + train("z", "a")
    )
    assert found == [
        "4:27: stages.a.model: stages form a cycle: a -> b -> c -> a",
        "7:27: stages.x.model: stages form a cycle: x -> y -> x",
    ]


@given(st.data())
def test_run_order_puts_upstream_first_and_else_keeps_the_written_order(data):
    names = data.draw(st.permutations([f"s{i}" for i in range(7)]))
    drafts = {name: Draft(name) for name in names}
    for name in names:
        # Only to smaller numbers: no cycles, in any written order.
        below = [other for other in names if other < name]
        drafts[name].upstream = tuple(data.draw(st.lists(st.sampled_from(below), unique=True))) if below else ()
    order = run_order(drafts)
    assert sorted(order) == sorted(names)
    for position, name in enumerate(order):
        assert set(drafts[name].upstream) <= set(order[:position])
        earlier = [other for other in order[position:] if names.index(other) < names.index(name)]
        assert all(not set(drafts[other].upstream) <= set(order[:position]) for other in earlier)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./model", None),
        ("org/name-1.5B_x", None),
        ("smollm2-135m-instruct", None),
        ("{from: ./model, keep_layers: [0, 2]}", None),
        ("./gone", "no such directory: {here}/gone"),
        ("{from: ../gone, keep_layers: 1}", "no such directory: {above}/gone"),
        ("./r.yaml", "no such directory: {here}/r.yaml"),
        ("~nobody-here/x", "no such directory: {here}/~nobody-here/x"),
        ("model", "no model 'model'; write ./model for the local path"),
        ("smollm2-135-instruct", "no model 'smollm2-135-instruct'; did you mean 'smollm2-135m-instruct'?"),
        ("a/b/c", "no model 'a/b/c'; a model is a Hub id (org/name), a path (./ ../ / ~) or smollm2"),
        ("org/", "no model 'org/'"),
        ("org/na me", "no model 'org/na me'"),
        ("https://x.org/a", "no model 'https://x.org/a'"),
    ],
)
def test_literal_models(desk, model, message):
    found = desk.problems(f"kdkit: 1\nname: x\nstages: {{t: {{kind: train, {ROWS}, model: {model}}}}}")
    if message is None:
        assert found == []
    else:
        (problem,) = found
        assert message.format(here=desk.path, above=desk.path.parent) in problem
        assert problem.startswith(f"r.yaml:3:{60 if model.startswith('{') else 53}: stages.t.model")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./r.yaml", None),
        ("./model", None),
        ("org/data", None),
        ("./gone.jsonl", "no such file or directory: {here}/gone.jsonl"),
        ("squad", "'squad' is neither a Hub id (org/name) nor a path (./ ../ / ~)"),
        ("model", "'model' is neither a Hub id (org/name) nor a path (./ ../ / ~); write ./model for the local path"),
    ],
)
def test_literal_datasets(desk, source, message):
    text = f"kdkit: 1\nname: x\nstages: {{t: {{kind: train, model: ./model, data: {{use: rows, source: {source}}}}}}}"
    expected = [f"r.yaml:3:69: stages.t.data.source: {message.format(here=desk.path)}"] if message else []
    assert desk.problems(text) == expected


def test_literal_scores_are_local(stages):
    assert stages("  t: {kind: table, scores: [./model, org/name]}") == [
        (
            "4:38: stages.t.scores.1: 'org/name' is neither a stage's output (${stages.NAME.OUTPUT}) "
            "nor a path (./ ../ / ~)"
        )
    ]

from __future__ import annotations

import ast

import pytest

from kdkit.api import Rollout
from kdkit.plugins.datasets.code_params import IOProblemsParams
from kdkit.plugins.datasets.io_problems import IOProblemsLoader
from kdkit.plugins.datasets.io_templates import problem, templates
from kdkit.plugins.rewards.params import StepsParams, ThinkParams
from kdkit.plugins.rewards.plugin import kdkit_rewards
from kdkit.plugins.rewards.programs import last_program
from kdkit.plugins.sandboxes.plugin import kdkit_sandboxes
from kdkit.testing.fakes import FakeBuildContext

TEMPLATES = list(templates())


def load(**values):
    return IOProblemsLoader(IOProblemsParams(**values)).load(FakeBuildContext()).examples


def test_templates_are_distinct_and_of_three_levels():
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES) > 150
    assert {template.level for template in TEMPLATES} == {1, 2, 3}


def test_no_template_is_in_two_parts_and_there_are_enough_held_out_problems():
    train, test = load(), load(split="test")
    assert not {row.extra["template"] for row in train} & {row.extra["template"] for row in test}
    assert len(test) >= 200
    assert len(train) > 2 * len(test)
    assert not {row.echo for row in train} & {row.echo for row in test}
    # Held-out combinations are of operations that training shows.
    shown = {part for row in train for part in row.extra["template"].split("/")}
    assert {part for row in test for part in row.extra["template"].split("/")} <= shown


def test_more_problems_of_a_template_leave_the_others_as_they_are():
    few, many = ({row.id: row for row in load(per_template=n)} for n in (2, 4))
    assert few.items() <= many.items()
    assert len(many) > len(few)


def test_levels_and_forms():
    assert {row.category for row in load(max_level=1, split="all")} == {"level-1"}
    asked = load(task="rl", think=False, max_level=2)
    assert {row.completion for row in asked} == {None}
    assert {len(row.prompt) for row in asked} == {1}
    (first, *_) = load(think=False, max_level=2)
    assert first.completion.startswith("```python\n")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_every_program_is_python_and_every_problem_has_tests_that_tell_programs_apart(template):
    for number in range(2):
        made = problem(template, number)
        assert made == problem(template, number)
        ast.parse(made.program)
        assert len(made.tests) == 7
        assert len({given for given, _ in made.tests}) > 3
        assert "{" not in made.statement + "".join(made.steps)
        # Printing what the example shows passes nothing.
        assert len({expected for _, expected in made.tests}) >= 2


def rewards(name, **values):
    spec = {spec.name: spec for spec in kdkit_rewards()}[name]
    return spec.build(spec.params(**values), FakeBuildContext())


def test_answers_have_the_form_that_rewards_want():
    rows = load(per_template=1)
    given = [Rollout("", row.completion, range(9), row) for row in rows]
    assert {score.value for score in rewards("think", **ThinkParams().model_dump())(given)} == {1.0}
    assert {score.value for score in rewards("steps", **StepsParams(steps=2).model_dump())(given)} == {1.0}
    for rollout in given:
        assert last_program(rollout.text.rpartition("</think>")[2], "python") is not None


def test_the_programs_pass_and_others_do_not():
    """Run without a jail: the programs are our own."""
    from kdkit.plugins.rewards.correctness import Correctness
    from kdkit.plugins.rewards.judge import Judge
    from kdkit.plugins.rewards.params import CorrectnessParams

    spec = {spec.name: spec for spec in kdkit_sandboxes()}["unsafe-local"]
    params = CorrectnessParams.model_construct(
        **{name: field.default for name, field in CorrectnessParams.model_fields.items()} | {"max_tests": 3}
    )
    judge = Correctness(params, Judge(spec.build(spec.params()), mode="tokens", tolerance=1e-6))
    rows = load(per_template=1, split="all")[::4]
    try:
        right = judge([Rollout("", row.completion, (), row) for row in rows])
        assert [score.reason for score in right if score.value != 1.0] == []
        wrong = judge([Rollout("", "```python\nprint(input())\n```", (), row) for row in rows])
        assert not any(score.value for score in wrong)
    finally:
        judge.close()

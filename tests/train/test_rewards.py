"""Several rewards as one sum: weights, schedules, statuses, and what stops a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdkit.api import ConformanceError, EnvironmentUnmet, Example, RewardScore, Rollout, SandboxReport, StageError
from kdkit.api.slots import Scheduled, Weighted
from kdkit.train.rewards import RewardSet, RewardTerm, reward_names

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))

from reward_helpers import Workshop, answer, problem

OK, NONE, ERROR = RewardScore.of, RewardScore.unscorable, RewardScore.infra_error


def term(name, scores, **given):
    """A reward with canned scores by the completion's text."""
    return RewardTerm(name=name, reward=lambda rollouts: [scores[r.text] for r in rollouts], **given)


def batch(*texts, prompt="Q"):
    return [Rollout(prompt, text, ()) for text in texts]


def test_the_total_is_the_weighted_sum():
    rewards = RewardSet(
        [term("a", {"x": OK(1.0), "y": OK(0.5)}, weight=0.1), term("b", {"x": OK(-1.0), "y": OK(0.25)}, weight=2.0)]
    )
    scored = rewards(batch("x", "y"))
    assert [total.value for total in scored.totals] == pytest.approx([0.1 - 2.0, 0.05 + 0.5])
    assert scored.components == {"a": (OK(1.0), OK(0.5)), "b": (OK(-1.0), OK(0.25))}
    assert scored.clamped == {}


def test_one_infrastructure_error_masks_the_completion():
    rewards = RewardSet([term("a", {"x": OK(1.0), "y": OK(1.0)}), term("b", {"x": ERROR("no disk"), "y": OK(0.0)})])
    totals = rewards(batch("x", "y")).totals
    assert totals == (ERROR("b: no disk"), OK(1.0))


def test_an_infrastructure_error_counts_before_an_unscorable_component():
    rewards = RewardSet([term("a", {"x": NONE("why"), "y": OK(1.0)}), term("b", {"x": ERROR("no disk"), "y": OK(0.0)})])
    assert rewards(batch("x", "y")).totals[0] == ERROR("b: no disk")


def test_a_component_that_judges_nothing_of_a_prompt_is_left_out_for_it():
    tests = {"x": OK(1.0), "y": OK(0.0), "p": NONE("no tests"), "q": NONE("no tests")}
    form = {"x": OK(0.5), "y": OK(0.5), "p": OK(0.5), "q": OK(0.25)}
    rewards = RewardSet([term("tests", tests), term("form", form)])
    scored = rewards([*batch("x", "y"), *batch("p", "q", prompt="essay")])
    assert [total.value for total in scored.totals] == [1.5, 0.5, 0.5, 0.25]


def test_within_a_group_all_totals_are_sums_of_the_same_components():
    """Left out for one completion only, a negative component would be an advantage to it."""
    rewards = RewardSet([term("a", {"x": OK(-1.0), "y": NONE("no letters")}), term("b", {"x": OK(1.0), "y": OK(1.0)})])
    assert rewards(batch("x", "y")).totals == (OK(0.0), NONE("a: no letters"))


def test_groups_go_by_example_and_prompt():
    one, other = Example(id="1", prompt="Q"), Example(id="2", prompt="Q")
    rewards = RewardSet([term("a", {"x": OK(1.0), "y": NONE("why")}), term("b", {"x": OK(0.0), "y": OK(0.5)})])
    assert rewards([Rollout("Q", "x", (), one), Rollout("Q", "y", (), other)]).totals == (OK(1.0), OK(0.5))


def test_nothing_that_can_judge_is_unscorable():
    rewards = RewardSet([term("a", {"x": NONE("no tests")}), term("b", {"x": NONE("no reference")})])
    assert rewards(batch("x")).totals == (NONE("a: no tests"),)


def test_the_order_of_completions_does_not_matter():
    scores = {"x": OK(1.0), "y": NONE("why"), "z": ERROR("down"), "w": OK(0.0)}
    rewards = RewardSet([term("a", scores), term("b", dict.fromkeys(scores, OK(0.5)))])
    forward, backward = rewards(batch(*scores)).totals, rewards(batch(*reversed(scores))).totals
    assert forward == backward[::-1]


def test_a_reward_joins_at_its_step():
    calls = []

    def late(rollouts):
        calls.append(len(rollouts))
        return [OK(1.0)] * len(rollouts)

    rewards = RewardSet([term("a", {"x": OK(0.5)}), RewardTerm(name="late", reward=late, from_step=10)])
    assert rewards(batch("x"), step=9).totals == (OK(0.5),)
    assert "late" not in rewards(batch("x"), step=9).components
    assert calls == [], "it is not even run"
    assert rewards(batch("x"), step=10).totals == (OK(1.5),)
    assert rewards(batch("x")).totals == (OK(1.5),)
    only = RewardSet([RewardTerm(name="late", reward=late, from_step=10)])
    assert only(batch("x"), step=0).totals == (NONE("no reward counts"),)


def test_values_outside_the_declared_range_are_clamped_and_counted():
    rewards = RewardSet([term("a", {"x": OK(3.0), "y": OK(-3.0), "z": OK(0.5)}, range=(0.0, 1.0))])
    scored = rewards(batch("x", "y", "z"))
    assert [total.value for total in scored.totals] == [1.0, 0.0, 0.5]
    assert scored.clamped == {"a": 2}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "reward a: 0 scores for 1 completions"),
        ([OK(1.0)] * 2, "2 scores"),
        ([OK(float("nan"))], "a value of nan"),
        ([OK(float("inf"))], "a value of inf"),
        ([RewardScore("ok", None)], "status 'ok' with the value None"),
        ([RewardScore("unscorable", 0.0, "x")], "status 'unscorable' with the value 0.0"),
        ([RewardScore("failed", None, "x")], "status 'failed'"),
    ],
)
def test_a_broken_contract_is_named(scores, message):
    with pytest.raises(ConformanceError, match=message):
        RewardSet([RewardTerm(name="a", reward=lambda rollouts: scores)])(batch("x"))


def test_metrics():
    scores = {"x": OK(1.0), "y": OK(0.0), "z": ERROR("down"), "w": NONE("why")}
    rewards = RewardSet([term("a", scores), term("b", dict.fromkeys(scores, OK(0.5)), weight=2.0)])
    metrics = rewards([*batch("x", "y", "z"), *batch("w", prompt="P")]).metrics()
    assert metrics == {
        "reward/a/mean": 0.5,
        "reward/a/std": 0.5,
        "reward/a/infra-error": 0.25,
        "reward/a/unscorable": 0.25,
        "reward/b/mean": 0.5,
        "reward/b/std": 0.0,
        "reward/total/mean": pytest.approx(4 / 3),
        "reward/total/std": pytest.approx((2 / 9) ** 0.5),
        "reward/total/infra-error": 0.25,
    }
    assert RewardSet([term("a", {"x": NONE("no")})])(batch("x")).metrics() == {
        "reward/a/unscorable": 1.0,
        "reward/total/unscorable": 1.0,
    }


def test_a_judge_that_fails_too_often_stops_the_run():
    rewards = RewardSet([term("a", {"x": OK(1.0), "z": ERROR("no disk")})])
    rewards(batch(*["x"] * 400, *["z"] * 10))
    with pytest.raises(StageError, match=r"11 of the last 411 .*a: no disk"):
        rewards(batch("z"))


def test_old_failures_are_forgotten():
    rewards = RewardSet([term("a", {"x": OK(1.0), "z": ERROR("no disk")})])
    for _ in range(10):
        rewards(batch(*["z"] * 10))
        rewards(batch(*["x"] * 500))


def test_names():
    shop = Workshop()
    components = [shop.component(name, Scheduled) for name in ("think", "length", "length", "think")]
    assert reward_names(components) == ["think", "length", "length-2", "think-2"]


def test_built_from_a_recipe():
    shop = Workshop({"add": lambda job: "3"})
    components = [
        shop.component("think", Scheduled, weight=0.25, from_step=5),
        shop.component("correctness", Weighted, weight=2.0),
        shop.component("length", Scheduled, max_tokens=100),
    ]
    rewards = RewardSet.build(components, shop.ctx)
    assert [(t.name, t.weight, t.from_step, t.range) for t in rewards.terms] == [
        ("think", 0.25, 5, (0.0, 1.0)),
        ("correctness", 2.0, 0, (0.0, 1.0)),
        ("length", 1.0, 0, (-1.0, 1.0)),
    ]
    example = problem(("1 2", "3"))
    scored = rewards([Rollout("Q", answer("add"), tuple(range(50)), example)], step=7)
    assert scored.totals[0].value == pytest.approx(0.25 + 2.0 + 0.75)
    assert len(shop.sandbox.jobs) == 1, "length asks the same judge"
    rewards.close()
    assert shop.sandbox.closed == 1


def test_a_sandbox_that_remembers_its_probe_is_not_probed_again():
    shop = Workshop()
    asked = []
    shop.sandbox.known = lambda: asked.append("known") or SandboxReport(usable=True)
    shop.sandbox.probe = lambda: asked.append("probe")
    RewardSet.build([shop.component("correctness", Weighted)], shop.ctx)
    assert asked == ["known"]


def test_no_sandbox_no_work():
    shop = Workshop(usable=False)
    for name in ("correctness", "length"):
        with pytest.raises(EnvironmentUnmet, match="cannot be run safely here: told to be unusable"):
            RewardSet.build([shop.component(name, Weighted)], shop.ctx)
    RewardSet.build([shop.component("think", Weighted)], shop.ctx)

"""Reward functions of TRL in kdkit."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import kdkit
from kdkit.adapters import from_trl_reward
from kdkit.api import ConformanceError, Example, Message, PluginError, Rollout
from kdkit.testing.conformance.reward import RewardConformance
from kdkit.testing.tiny import save_tiny_model

sys.path.insert(0, str(Path(__file__).parent))

from trl_rewards_plugin import contains

PLUGIN = Path(__file__).with_name("trl_rewards_plugin.py")
CHAT = Example(
    id="1", prompt=(Message("system", "Be brief."), Message("user", "2 + 2?")), completion="four", extra={"level": 3}
)
PLAIN = Example(id="2", prompt="2 + 2 =", completion="4", references=("4", "four"), category="sums")


def rollout(text="four", example=CHAT, prompt="rendered", ids=(5, 6)):
    return Rollout(prompt, text, ids, example)


class Spy:
    """A reward function that keeps what it was called with."""

    def __init__(self, returns=None):
        self.calls = []
        self.returns = returns

    def __call__(self, prompts, completions, completion_ids, **columns):
        self.calls.append({"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns})
        return [1.0] * len(prompts) if self.returns is None else self.returns


def test_conversational_prompts_come_as_messages():
    spy = Spy()
    from_trl_reward(spy)([rollout()])
    (call,) = spy.calls
    assert call["prompts"] == [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]]
    assert call["completions"] == [[{"role": "assistant", "content": "four"}]]
    assert call["completion_ids"] == [[5, 6]]
    assert call["level"] == [3]
    assert not {"prompt", "completion", "trainer_state"} & call.keys()
    call["log_extra"]("column", [1])
    call["log_metric"]("name", 1.0)


def test_plain_prompts_come_as_texts():
    spy = Spy()
    from_trl_reward(spy)([rollout("4", PLAIN, prompt="2 + 2 =")])
    assert (spy.calls[0]["prompts"], spy.calls[0]["completions"]) == (["2 + 2 ="], ["4"])


@pytest.mark.parametrize(
    ("form", "example", "prompt", "completion"),
    [
        ("standard", CHAT, "rendered", "four"),
        ("conversational", PLAIN, [{"role": "user", "content": "2 + 2 ="}], [{"role": "assistant", "content": "four"}]),
        ("conversational", None, [{"role": "user", "content": "rendered"}], [{"role": "assistant", "content": "four"}]),
        ("auto", None, "rendered", "four"),
    ],
)
def test_the_format_can_be_set(form, example, prompt, completion):
    spy = Spy()
    from_trl_reward(spy, format=form)([rollout(example=example)])
    assert (spy.calls[0]["prompts"], spy.calls[0]["completions"]) == ([prompt], [completion])


def test_a_call_has_one_format_and_scores_come_in_order():
    def long(completions, **kwargs):
        assert len({type(completion) for completion in completions}) == 1
        return [len(c if isinstance(c, str) else c[0]["content"]) for c in completions]

    scores = from_trl_reward(long)(
        [rollout("a"), rollout("bb", PLAIN), rollout("ccc"), rollout("dddd", PLAIN), rollout("", None)]
    )
    assert [score.value for score in scores] == [1, 2, 3, 4, 0]


def test_columns_are_made_of_what_the_example_has():
    spy = Spy()
    named = {"solution": "completion", "answers": "references", "row": "id", "kind": "category", "depth": "level"}
    from_trl_reward(spy, columns=named)([rollout(example=CHAT), rollout(example=None)])
    conversational, standard = spy.calls
    assert conversational["solution"] == ["four"]
    assert conversational["row"] == ["1"]
    assert conversational["depth"] == [3]
    assert conversational["answers"] == conversational["kind"] == [None]
    assert standard["solution"] == standard["depth"] == [None]
    from_trl_reward(spy, columns=named)([rollout(example=PLAIN)])
    assert spy.calls[-1]["answers"] == [["4", "four"]]
    assert spy.calls[-1]["kind"] == ["sums"]


def test_columns_with_names_of_others_neither_hide_nor_show_them():
    """What TRL's trainer gives under a name of its own is no column, and a field of the example stays what it is."""
    own = {"prompt": "p", "completion": "c", "trainer_state": 1, "environments": 2, "log_extra": 3, "category": "other"}
    spy = Spy()
    example = Example(id="5", prompt="2 + 2 =", completion="4", category="sums", extra=own)
    from_trl_reward(spy, columns={"solution": "completion", "kind": "category"})([rollout(example=example)])
    (call,) = spy.calls
    assert not {"prompt", "completion", "trainer_state", "environments"} & call.keys()
    assert callable(call["log_extra"])
    assert (call["solution"], call["kind"], call["category"]) == (["4"], ["sums"], ["other"])


def test_columns_that_some_rows_lack_are_none_there():
    spy = Spy()
    rows = [rollout(example=CHAT), rollout(example=Example(id="3", prompt=CHAT.prompt, extra={"tests": ["x"]}))]
    from_trl_reward(spy)(rows)
    assert spy.calls[0]["level"] == [3, None]
    assert spy.calls[0]["tests"] == [None, ["x"]]


def test_a_missing_column_that_the_function_requires_makes_unscorable():
    asked = []

    def strict(completions, level):
        asked.append(level)
        return [float(value) for value in level]

    bare = Example(id="4", prompt=CHAT.prompt)
    scores = from_trl_reward(strict)([rollout(example=bare), rollout(), rollout(example=None)])
    assert [score.status for score in scores] == ["unscorable", "ok", "unscorable"]
    assert scores[0].reason == "the example has no level"
    assert asked == [[3]]
    assert from_trl_reward(strict)([rollout(example=bare)])[0].status == "unscorable"
    assert asked == [[3]], "a function is not called for nothing"


def test_a_function_gets_what_its_signature_names():
    def only(completions):
        return [0.5] * len(completions)

    assert from_trl_reward(only)([rollout()])[0].value == 0.5

    def logs(completions, log_metric):
        log_metric("words", 1.0)
        return [0.25] * len(completions)

    assert from_trl_reward(logs)([rollout()])[0].value == 0.25


def test_none_is_unscorable_and_numbers_of_any_kind_are_values():
    kinds = [None, 1, True, torch.tensor(0.25), 0.5]
    scores = from_trl_reward(Spy(kinds))([rollout()] * 5)
    assert [score.value for score in scores] == [None, 1.0, 1.0, 0.25, 0.5]
    assert [score.status for score in scores] == ["unscorable", "ok", "ok", "ok", "ok"]
    assert scores[0].reason
    tensor = from_trl_reward(Spy(torch.tensor([0.5, 1.0])))([rollout()] * 2)
    assert [score.value for score in tensor] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "it returned 1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], "it returned 3 rewards for 2 completions"),
        (
            [1.0, math.nan],
            "completion 1: a reward of nan; allowed: a finite number or None; give None for a completion",
        ),
        ([math.inf, 1.0], "completion 0: a reward of inf"),
        (["good", 1.0], "completion 0: 'good' is no number; allowed: a float or None"),
        ([[1.0], 1.0], "completion 0: [1.0] is no number"),
        (1.0, "it returned a float; allowed: a list"),
        ("ab", "it returned a str; allowed: a list"),
        ({0: 1.0, 1: 2.0}, "it returned a dict; allowed: a list"),
        ({1.0, 2.0}, "it returned a set; allowed: a list"),
        (b"ab", "it returned a bytes; allowed: a list"),
        (torch.tensor(1.0), "it returned a Tensor; allowed: a list"),
        ([], "it returned 0 rewards for 2 completions"),
    ],
)
def test_what_is_no_list_of_rewards_is_refused_by_name(returned, message):
    with pytest.raises(ConformanceError) as error:
        from_trl_reward(Spy(returned))([rollout()] * 2)
    assert str(error.value).startswith("reward function Spy")
    assert message in str(error.value)


async def asynchronous(completions, **kwargs):
    return [0.0] * len(completions)


class Asynchronous:
    async def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)


def state(completions, trainer_state, **kwargs):
    return [0.0] * len(completions)


def by_place(completions, solution=None, /, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (asynchronous, {}, "asynchronous is asynchronous"),
        (partial(asynchronous), {}, "asynchronous is asynchronous"),
        (Asynchronous(), {}, "Asynchronous is asynchronous"),
        (state, {}, "state requires trainer_state, which only TRL's trainer has; give it a default"),
        (by_place, {}, "by_place takes completions, solution by position only, and is called by names; leave the /"),
        ("org/reward-model", {}, "'org/reward-model' is no function"),
        (contains, {"format": "chat"}, "no format 'chat'; allowed: auto, standard, conversational"),
        (contains, {"columns": {"prompts": "id"}}, "prompts cannot be a column"),
    ],
)
def test_functions_that_cannot_work_are_refused_when_they_are_wrapped(fn, options, message):
    with pytest.raises(PluginError) as error:
        from_trl_reward(fn, **options)
    assert message in str(error.value)
    assert error.value.exit_code == 3


def test_the_name_is_the_functions():
    assert from_trl_reward(partial(contains, full=2.0)).__name__ == "contains"


class TestContains(RewardConformance):
    range = (0.0, 1.0)

    def build(self):
        return from_trl_reward(contains, columns={"solution": "completion"})

    def rollouts(self):
        texts = ("four", "it is four", "five", "", "FOUR", "fourteen")
        return [Rollout("2 + 2?", text, tuple(text.encode()), CHAT) for text in texts]


# --- in a recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def recipe(tmp_path, model, reward):
    rows = [{"prompt": f"{i}?", "completion": f"{i} it is"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "kind": "evaluate",
        "models": {"tiny": str(model)},
        "data": {"use": "jsonl", "source": "./rows.jsonl", "split": "all"},
        "metrics": [{"use": "length"}],
        "rewards": [reward],
        "sampling": {"max_new_tokens": 16},
        "precision": "fp32",
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"kdkit": 1, "name": "test", "plugins": [str(PLUGIN)], "stages": {"eval": stage}}))
    return file


def test_a_plugin_file_brings_a_function_of_trl_into_a_recipe(tmp_path, model):
    result = kdkit.run(recipe(tmp_path, model, {"use": "contains", "full": 1.0}), inline=True, out=tmp_path / "runs")
    assert result.ok, result.error
    scores = json.loads((result.stage("eval").outputs["scores"].path / "scores.json").read_text())
    entry = scores["models"]["tiny"]["results"]["jsonl"]["reward-contains"]
    assert entry["n"] == 8
    assert all(0 <= value <= 1 for value in entry["per_example"])


def test_its_parameters_are_checked_with_the_recipe(tmp_path, model):
    (problem,) = kdkit.validate(recipe(tmp_path, model, {"use": "contains", "ful": 1.0}))
    assert "ful" in problem.path

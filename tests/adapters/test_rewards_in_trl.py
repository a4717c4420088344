"""kdkit's rewards in TRL's trainers, called by TRL's own code. Runs where TRL is installed (extra: peers)."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

import kdkit
from kdkit.adapters import as_trl_reward, from_trl_reward
from kdkit.api import ConformanceError, RecipeError, RewardScore
from kdkit.testing.tiny import tiny_model, tiny_tokenizer

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say it."}]


def said(text):
    return [{"role": "assistant", "content": text}]


class Kept:
    """A reward that keeps its rollouts and gives the scores it was told to."""

    def __init__(self, *scores):
        self.scores = scores
        self.rollouts = []
        self.closed = False

    def __call__(self, rollouts, /):
        self.rollouts += rollouts
        return list(self.scores) or [RewardScore.of(len(rollout.text)) for rollout in rollouts]

    def close(self):
        self.closed = True


def test_conversational_completions():
    kept = Kept()
    values = as_trl_reward(kept)(
        prompts=[PROMPT, PROMPT],
        completions=[said("yes"), said("no")],
        completion_ids=[[1, 2], [3]],
        tests=[["a"], None],
    )
    assert values == [3.0, 2.0]
    first, second = kept.rollouts
    assert first.text == "yes"
    assert first.token_ids == (1, 2)
    assert [message.role for message in first.example.prompt] == ["system", "user"]
    assert first.prompt == "Be brief.\nSay it."
    assert first.example.extra == {"tests": ["a"]}
    assert second.example.extra == {"tests": None}
    assert first.example.id == second.example.id, "rewards tell groups by the id"


def test_standard_completions_and_ids_of_the_data():
    kept = Kept()
    as_trl_reward(kept)(prompts=["a", "a"], completions=["x", "y"], completion_ids=[[1], [2]], id=[0, 7])
    assert [rollout.example.id for rollout in kept.rollouts] == ["0", "7"]
    assert kept.rollouts[0].example.prompt == kept.rollouts[0].prompt == "a"


def test_prompts_differ_in_their_ids():
    kept = Kept()
    as_trl_reward(kept)(["a", "b"], ["x", "y"])
    assert len({rollout.example.id for rollout in kept.rollouts}) == 2


def test_only_the_models_words_count():
    kept = Kept()
    turns = [
        {"role": "assistant", "content": [{"type": "text", "text": "I "}, {"type": "text", "text": "look"}]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "it is 42"},
    ]
    as_trl_reward(kept)([PROMPT], [turns])
    assert kept.rollouts[0].text == "I look\n\nit is 42"


def test_references_are_a_column():
    kept = Kept()
    as_trl_reward(kept, references="solution")(
        ["a", "b", "c"], ["x", "y", "z"], solution=["one", ["two", "three"], None]
    )
    assert [rollout.example.references for rollout in kept.rollouts] == [("one",), ("two", "three"), ()]


def test_references_may_be_numbers():
    kept = Kept()
    as_trl_reward(kept, references="answer")(["a"] * 4, ["x"] * 4, answer=[0, 2.5, [1, None, "two"], ""])
    assert [rollout.example.references for rollout in kept.rollouts] == [("0",), ("2.5",), ("1", "two"), ("",)]


def test_a_column_of_references_that_is_not_there_is_named():
    with pytest.raises(ConformanceError) as error:
        as_trl_reward(Kept(), references="solutoin")(["a"], ["x"], solution=["y"], level=[3])
    assert str(error.value) == (
        "reward Kept: the dataset has no column 'solutoin' with references; allowed: solution, level"
    )


def test_what_has_no_value_is_none():
    scores = (RewardScore.of(0.5), RewardScore.unscorable("no tests"), RewardScore.infra_error("down"))
    assert as_trl_reward(Kept(*scores))(["a"] * 3, ["x"] * 3) == [0.5, None, None]


def test_a_wrong_number_of_scores_is_refused_by_name():
    with pytest.raises(ConformanceError, match="reward Kept: 1 scores for 2 completions"):
        as_trl_reward(Kept(RewardScore.of(1.0)))(["a", "b"], ["x", "y"])


def test_a_reward_by_name_has_its_parameters():
    reward = as_trl_reward("length", shape="target", min_tokens=2, max_tokens=3, margin=0)
    assert reward.__name__ == "length"
    assert reward(["a"] * 3, ["x"] * 3, [[1, 2], [1] * 3, []]) == [1.0, 1.0, 0.0]
    assert as_trl_reward("kdkit/repetition").__name__ == "repetition"


def test_mistakes_are_named():
    with pytest.raises(RecipeError, match="no reward 'lenght'"):
        as_trl_reward("lenght")
    with pytest.raises(RecipeError, match="longest"):
        as_trl_reward("length", longest=3)
    with pytest.raises(TypeError, match="max_length"):
        as_trl_reward(kdkit.build("reward", "repetition"), max_length=3)


def test_closing_closes_the_reward():
    kept = Kept()
    as_trl_reward(kept).close()
    assert kept.closed
    as_trl_reward(lambda rollouts: []).close()


# --- TRL's own code ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grpo():
    pytest.importorskip("trl")
    return importlib.import_module("trl.trainer.grpo_trainer")


def calculated(grpo, rewards, inputs, completions, ids):
    """TRL's matrix of rewards, of the method that its trainer calls them in."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    trainer = SimpleNamespace(
        accelerator=accelerator,
        reward_funcs=rewards,
        reward_processing_classes=[None] * len(rewards),
        reward_func_names=[importlib.import_module("trl.trainer.utils").get_callable_name(fn) for fn in rewards],
        state=SimpleNamespace(global_step=0, log_history=[]),
        environments=None,
        args=SimpleNamespace(report_to=[]),
        _log_completion_extra=lambda *_: None,
        _log_metric=lambda *_: None,
    )
    prompts = [row["prompt"] for row in inputs]
    return trainer.reward_func_names, grpo.GRPOTrainer._calculate_rewards(trainer, inputs, prompts, completions, ids)


def test_trl_calls_it_and_reads_what_it_returns(grpo, monkeypatch):
    monkeypatch.setattr(grpo, "gather", lambda tensor: tensor)
    kept = Kept(RewardScore.of(0.5), RewardScore.unscorable("no tests"))
    inputs = [
        {"prompt": PROMPT, "tests": ["a"], "solution": "yes"},
        {"prompt": PROMPT, "tests": None, "solution": "no"},
    ]
    rewards = [as_trl_reward(kept), as_trl_reward("repetition")]
    names, found = calculated(grpo, rewards, inputs, [said("yes"), said("no")], [[1], [2]])
    assert names == ["Kept", "repetition"]
    assert found[0, 0] == 0.5
    assert torch.isnan(found[1, 0])
    assert found[:, 1].isfinite().all()
    # Neither the trainer's state nor its loggers become columns.
    assert kept.rollouts[0].example.extra == {"tests": ["a"], "solution": "yes"}


def test_there_and_back_is_the_same_function(grpo, monkeypatch):
    """What a function sees through kdkit is what it sees in TRL."""
    monkeypatch.setattr(grpo, "gather", lambda tensor: tensor)
    seen = []

    def spy(prompts, completions, completion_ids, tests, **kwargs):
        seen.append((prompts, completions, completion_ids, tests))
        return [
            float(len(completion[0]["content"])) if test else None
            for completion, test in zip(completions, tests, strict=True)
        ]

    inputs = [{"prompt": PROMPT, "tests": ["a"]}, {"prompt": PROMPT, "tests": None}]
    both = [spy, as_trl_reward(from_trl_reward(spy)), as_trl_reward("repetition")]
    names, found = calculated(grpo, both, inputs, [said("yes"), said("no")], [[1], [2]])
    assert seen[0] == seen[1]
    assert names == ["spy", "spy", "repetition"]
    torch.testing.assert_close(found[:, 0], found[:, 1], equal_nan=True)


def test_a_real_trainer_takes_a_step_with_it(grpo, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig

    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": str(i)} for i in range(2)]
    kept = Kept()
    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = grpo.GRPOTrainer(
        model=tiny_model(),
        reward_funcs=[as_trl_reward("length", shape="target", min_tokens=1, max_tokens=8), as_trl_reward(kept)],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/length/mean"] == 1.0
    lengths = [len(rollout.text) for rollout in kept.rollouts]
    assert len(lengths) == 4
    assert logged["rewards/Kept/mean"] == pytest.approx(sum(lengths) / 4)
    assert {rollout.example.extra["answer"] for rollout in kept.rollouts} == {"0", "1"}
    assert all(rollout.token_ids for rollout in kept.rollouts)

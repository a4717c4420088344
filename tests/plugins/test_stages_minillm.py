"""The minillm stage, as a recipe asks for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import kdkit
from kdkit.plugins.stages.minillm import estimator_of
from kdkit.plugins.stages.minillm_plugin import MiniLLMStageParams
from kdkit.recipe import load_recipe
from kdkit.testing.tiny import save_tiny_model, tiny_tokenizer
from kdkit.train.policy.returns import Estimator

ROWS = [{"prompt": f"What is {'very ' * (i % 4)}{i} + {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
DATA = {"use": "jsonl", "source": "./rows.jsonl", "split": "train", "test_fraction": 0.2}
PLUGIN = '''
from __future__ import annotations
from kdkit import Params, hookimpl
from kdkit.api import Completion, RolloutSpec, TeacherSpec

class Nothing(Params):
    """Nothing."""

class Echo:
    """Answers with what was asked; every third answer is cut."""

    def generate(self, prompts, sampling, seeds, /):
        return [Completion("", tuple(ids[:3]), truncated=place % 3 == 2) for place, ids in enumerate(prompts)]

@hookimpl
def kdkit_teachers():
    """Teachers."""
    yield TeacherSpec(name="stored", summary="Signals of the data's answers", params=Nothing,
                      build=lambda params, ctx: None, gives=frozenset({"topk"}), fixed_rows=True)
    yield TeacherSpec(name="remote", summary="Top k of a server", params=Nothing,
                      build=lambda params, ctx: None, gives=frozenset({"topk"}))

@hookimpl
def kdkit_rollouts():
    """Engines."""
    yield RolloutSpec(name="echo", summary="Echo", params=Nothing, build=lambda params, ctx, model: Echo())
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "teacher", layers=3, seed=1)
    save_tiny_model(root / "student", seed=2)
    return root


def recipe(tmp_path: Path, models: Path, **values) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "other.py").write_text(PLUGIN)
    stage = {
        "kind": "minillm",
        "model": str(models / "student"),
        "teacher": {"use": "local", "model": str(models / "teacher"), "precision": "fp32"},
        "data": DATA,
        "sampling": {"max_new_tokens": 8},
        "num_rollouts": 8,
        "ppo_epochs": 2,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "logging_steps": 1,
        **values,
    }
    text = {"kdkit": 1, "name": "test", "plugins": ["./other.py"], "stages": {"own": stage}}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(text, indent=1))
    return file


def finished(result) -> tuple[str, list[dict], dict]:
    """Hash of the weights, metrics line by line, and what the model says about its training."""
    assert result.ok, result.error
    path = result.stage("own").outputs["model"].path
    lines = [line for line in result.stage("own").metrics() if "train/loss" in line]
    facts = json.loads((path / "kdkit.json").read_text())
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest(), lines, facts


def run(tmp_path: Path, models: Path, **values) -> tuple[str, list[dict], dict]:
    return finished(kdkit.run(recipe(tmp_path, models, **values), out=tmp_path / "runs", inline=True))


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_reverse_kl_on_its_own_answers_falls(tmp_path, models):
    _, lines, facts = run(
        tmp_path, models, max_steps=60, num_rollouts=16, learning_rate=1e-2, per_device_train_batch_size=8,
        lm_data=DATA, lm_coef=0.1, teacher_mixed_alpha=0.2,
    )  # fmt: skip
    values = [line["train/reverse_kl_estimate"] for line in lines if "train/reverse_kl_estimate" in line]
    assert len(values) == 15, "an iteration lasts four steps"
    assert sum(values[-5:]) / 5 < 0.7 * sum(values[:2]) / 2
    steps = [line["train/single-step"] for line in lines]
    assert sum(steps[-4:]) / 4 < 0.6 * steps[0]
    for line in lines:
        parts = line["train/minillm"] + line["train/single-step"]
        parts += 0.05 * (line["train/lm/cross-entropy"] + line["train/lm/forward-kl"])
        assert line["train/loss"] == pytest.approx(parts, rel=1e-4, abs=1e-5)
    assert 0 < lines[0]["train/answer_tokens"] <= 8
    assert lines[0]["train/mismatch_max"] < 1e-4
    assert lines[0]["train/minillm/ratio"] == pytest.approx(1, abs=1e-4)
    assert facts["method"] == "minillm on its own answers"


@pytest.mark.parametrize("values", [
    {"losses": [{"use": "on-policy-reverse-kl"}]},
    {"single_step": False, "teacher_mixed_alpha": 0, "whiten": "none"},
    {"sampling": {"max_new_tokens": 8, "temperature": 1.5, "top_k": 30, "top_p": 0.9}, "parity": "code"},
    {"importance": "per-decision", "gamma": 1, "length_norm": False, "whiten": "paper", "reward_scaling": 0.5,
     "cliprange_reward": 1.0, "losses": [{"use": "minillm", "weight": 2.0, "is_in_clip": False}]},
])  # fmt: skip
def test_every_form_of_it_trains(tmp_path, models, values):
    _, lines, _ = run(tmp_path, models, max_steps=4, **values)
    assert ("train/single-step" in lines[0]) == ("whiten" not in values and "losses" not in values) or (
        "importance" in values
    )
    if "losses" in values and "importance" not in values:
        assert lines[0]["train/importance_weight"] == 1
        assert lines[0]["train/on-policy-reverse-kl"] == pytest.approx(-lines[0]["train/reward"], abs=0.3)
    if "importance" in values:
        total = 2 * (lines[0]["train/minillm"] + lines[0]["train/single-step"])
        assert lines[0]["train/loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_does_not_look_like_a_change_of_the_policy(tmp_path, models, checkpointing):
    from transformers import GPT2Config, GPT2LMHeadModel

    drops = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    sizes = {"vocab_size": 259, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ids = {"bos_token_id": 256, "eos_token_id": 258}
    GPT2LMHeadModel(GPT2Config(**sizes, **drops, **ids)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    more = {"model": str(tmp_path / "gpt2"), "teacher_mixed_alpha": 0, "gradient_checkpointing": checkpointing}
    result = kdkit.run(recipe(tmp_path, models, max_steps=2, **more), out=tmp_path / "runs", inline=True)
    _, lines, _ = finished(result)
    assert lines[0]["train/minillm/ratio"] == pytest.approx(1, abs=1e-5)
    assert lines[0]["train/minillm/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert lines[0]["train/minillm/clip_fraction"] == 0
    saved = json.loads((result.stage("own").outputs["model"].path / "config.json").read_text())
    assert {name: saved[name] for name in drops} == drops


def test_another_engine_answers_without_a_mixture(tmp_path, models):
    _, lines, _ = run(tmp_path, models, max_steps=4, rollout={"use": "echo"}, teacher_mixed_alpha=0)
    assert lines[0]["train/truncated_share"] == 0.25
    # Three tokens, and the end token where the answer was not cut.
    assert lines[0]["train/answer_tokens"] == (6 * 4 + 2 * 3) / 8
    assert not any("mismatch" in name for name in lines[0])


def test_held_out_rows_are_measured_by_the_single_step_or_the_second_stream(tmp_path, models):
    held_out = {**DATA, "split": "test"}
    more = {"eval_data": held_out, "max_steps": 2}
    for lm, names in (({}, {"single-step"}), ({"lm_data": DATA}, {"lm/cross-entropy", "lm/forward-kl"})):
        result = kdkit.run(recipe(tmp_path, models, **more, **lm), out=tmp_path / "runs", inline=True)
        assert result.ok, result.error
        values = [line for line in result.stage("own").metrics() if "eval/loss" in line]
        assert {name[5:] for name in values[-1] if name.startswith("eval/")} == {"loss", *names}


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory, models):
    root = tmp_path_factory.mktemp("straight")
    return run(root, models, **SCHEDULE)


SCHEDULE = {"lm_data": DATA, "sampling": {"max_new_tokens": 8, "top_k": 40}}
"""8 steps: two iterations of two epochs of two steps."""


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_run_that_stops_goes_on_to_bitwise_the_same_weights(tmp_path, models, straight, monkeypatch, stop):
    """In the middle of an epoch, between epochs, between iterations."""
    from kdkit.engine.context import Context

    real, seen = Context.progress, {"step": 0}

    def progress(self, step, total, /, **values):
        seen["step"] = step
        real(self, step, total, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "progress", progress)
        patch.setattr(Context, "stopping", lambda self: seen["step"] == stop)
        monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
        stopped = kdkit.run(recipe(tmp_path, models, **SCHEDULE), out=tmp_path / "runs", inline=True)
        assert not stopped.ok
    weights, lines, _ = run(tmp_path, models, **SCHEDULE)
    assert weights == straight[0]
    made = [line["step"] for line in lines if "train/reward" in line]
    assert made == [1, 5], "rollouts that a checkpoint holds are not made again"


def test_a_run_that_dies_while_it_samples_goes_on_to_bitwise_the_same_weights(tmp_path, models, straight, monkeypatch):
    from kdkit.plugins.rollouts import transformers_engine

    real, calls = transformers_engine.decode, []

    def dying(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            real(*args, **options)
            raise kdkit.api.StageError("the power is gone")
        return real(*args, **options)

    schedule = {**SCHEDULE, "save_steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr(transformers_engine, "decode", dying)
        monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
        died = kdkit.run(recipe(tmp_path, models, **schedule), out=tmp_path / "runs", inline=True)
        assert "the power is gone" in str(died.error)
    weights, lines, _ = run(tmp_path, models, **schedule)
    assert weights == straight[0]
    assert [line["step"] for line in lines if "train/learned_tokens" in line] == list(range(1, 9))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "expected"), [
    ({"num_rollouts": 10}, "stages.own.num_rollouts: 10 is no multiple of the 4 rows of a step"),
    ({"losses": [{"use": "reverse-kl"}]}, "stages.own.losses.0.use: 'reverse-kl' is a token loss; this stage takes"),
    ({"losses": [{"use": "grpo", "beta": 0.1}]}, "stages.own.losses.0.use: 'grpo' needs a reference model"),
    ({"losses": [{"use": "minillm"}, {"use": "minillm"}]}, "stages.own.losses.1.use: 'minillm' appears twice"),
    ({"losses": [{"use": "on-policy-reverse-kl"}], "single_step": True}, "stages.own.single_step: it goes with"),
    ({"sampling": {"do_sample": False}}, "stages.own.sampling.do_sample: a policy gradient needs sampled answers"),
    ({"rollout": {"use": "echo"}}, "stages.own.rollout.use: 'echo' cannot sample from a mixture with the teacher"),
    ({"rollout": {"use": "echo"}, "teacher_mixed_alpha": 0, "sampling": {"top_k": 5}},
     "stages.own.rollout.use: 'echo' does not say what top_k and top_p kept"),
    ({"teacher": {"use": "stored"}}, "stages.own.teacher.use: 'stored' knows only the data's answers"),
    ({"teacher": {"use": "remote"}}, "stages.own.teacher.use: 'remote' cannot take part in the sampling"),
    ({"teacher": {"use": "remote"}, "teacher_mixed_alpha": 0, "sampling": {"temperature": 0.7}},
     "stages.own.teacher.use: 'remote' gives log-probabilities of the whole vocabulary at temperature 1"),
    ({"lm_coef": 0.5}, "stages.own.lm_coef: lm_coef needs lm_data"),
    ({"losses": [{"use": "on-policy-reverse-kl"}], "eval_data": DATA}, "stages.own.eval_data: held-out rows are"),
    ({"teacher_mixed_alpha": 1.0}, "stages.own.teacher_mixed_alpha: must be less than 1"),
])  # fmt: skip
def test_what_it_refuses_before_anything_runs(tmp_path, models, values, expected):
    (problem,) = kdkit.validate(recipe(tmp_path, models, **values))
    assert f"{problem.path}: {problem.message}".startswith(expected)
    assert problem.line


def test_a_server_may_be_the_teacher_of_plain_sampling(tmp_path, models):
    assert kdkit.validate(recipe(tmp_path, models, teacher={"use": "remote"}, teacher_mixed_alpha=0)) == []


def test_prompts_without_room_are_left_out_or_answered_shortly(tmp_path, models):
    result = kdkit.run(recipe(tmp_path, models, max_length=20), out=tmp_path / "runs", inline=True)
    assert "is so short that max_length=20 leaves 8 tokens for an answer; the shortest has 14" in str(result.error)
    _, lines, _ = run(tmp_path, models, max_length=20, overlong="truncate", max_steps=1)
    assert 0 < lines[0]["train/answer_tokens"] < 6


def test_another_vocabulary_is_refused(tmp_path, models, tmp_path_factory):
    from kdkit.testing.tiny import tiny_piece_tokenizer

    other = save_tiny_model(tmp_path_factory.mktemp("other") / "m", vocab=387, tokenizer=tiny_piece_tokenizer())
    teacher = {"use": "local", "model": str(other)}
    result = kdkit.run(recipe(tmp_path, models, teacher=teacher), out=tmp_path / "runs", inline=True)
    assert "student and teacher have different vocabularies" in str(result.error)


@pytest.mark.parametrize(("values", "changes"), [
    ({}, {}),
    ({"single_step": False}, {"single_step_decomposition": False}),
    ({"losses": [{"use": "on-policy-reverse-kl"}]}, {"single_step_decomposition": False, "alpha": 0.0}),
    ({"losses": [{"use": "on-policy-reverse-kl"}], "teacher_mixed_alpha": 0.5},
     {"single_step_decomposition": False, "alpha": 0.5}),
    ({"teacher_mixed_alpha": 0.0, "gamma": 1.0, "length_norm": False, "whiten": "paper", "reward_scaling": 0.5,
      "cliprange_reward": 100.0, "importance": "per-decision", "parity": "code"},
     {"alpha": 0.0, "gamma": 1.0, "length_normalization": False, "whiten": "paper", "reward_scaling": 0.5,
      "cliprange_reward": 100.0, "importance": "per-decision", "parity": "code"}),
])  # fmt: skip
def test_every_parameter_of_the_estimate_arrives(tmp_path, models, values, changes):
    stage = load_recipe(recipe(tmp_path, models, **values)).stages["own"]
    wanted = {"alpha": 0.2, "gamma": 0.95, "single_step_decomposition": True, "width": 8, **changes}
    assert estimator_of(stage.params) == Estimator(**wanted)


def test_the_defaults():
    fields = MiniLLMStageParams.model_fields
    assert fields["num_rollouts"].default == 64
    assert fields["whiten"].default == "valid"
    assert (fields["importance"].default, fields["parity"].default) == ("token", "paper")

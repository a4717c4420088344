"""The distill stage with the student's own answers, as a recipe asks for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import kdkit
from kdkit.plugins.stages.plugin import DistillParams, OwnAnswers
from kdkit.testing.tiny import save_tiny_model

ROWS = [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": f"{i}!"},
            {"role": "user", "content": "More."},
            {"role": "assistant", "content": "No."},
        ]
    }
    for i in range(20)
]
PLUGIN = '''
from __future__ import annotations
from kdkit import Params, hookimpl
from kdkit.api import TeacherSpec

class Nothing(Params):
    """Nothing."""

@hookimpl
def kdkit_teachers():
    """Teachers."""
    yield TeacherSpec(name="stored", summary="Signals of the data's answers", params=Nothing,
                      build=lambda params, ctx: None, gives=frozenset({"topk"}), fixed_rows=True)
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "teacher", layers=3, seed=1)
    save_tiny_model(root / "student", seed=2)
    save_tiny_model(root / "wide", vocab=320, seed=2, tied=False)
    return root


def recipe(tmp_path: Path, models: Path, rows: list = ROWS, **values) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "kind": "distill",
        "model": str(models / "student"),
        "teacher": {"use": "local", "model": str(models / "teacher"), "precision": "fp32"},
        "data": {"use": "jsonl", "source": "./rows.jsonl", "split": "train", "test_fraction": 0.2},
        "losses": [{"use": "jsd"}],
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "logging_steps": 1,
        **values,
    }
    (tmp_path / "stored.py").write_text(PLUGIN)
    text = {"kdkit": 1, "name": "test", "plugins": ["./stored.py"], "stages": {"kd": stage}}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(text, indent=1))
    return file


def run(tmp_path: Path, models: Path, **values) -> tuple[str, list[dict], dict]:
    """Hash of the weights, metrics line by line, and what the model says about its training."""
    result = kdkit.run(recipe(tmp_path, models, **values), out=tmp_path / "runs", inline=True)
    assert result.ok, result.error
    path = result.stage("kd").outputs["model"].path
    lines = [line for line in result.stage("kd").metrics() if "train/loss" in line]
    facts = json.loads((path / "kdkit.json").read_text())
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest(), lines, facts


def problems(tmp_path: Path, models: Path, **values) -> list[str]:
    return [f"{p.path}: {p.message}" for p in kdkit.validate(recipe(tmp_path, models, **values))]


def test_a_recipe_mixes_its_students_own_answers_in(tmp_path, models, monkeypatch):
    sampling = {"max_new_tokens": 12}
    first, lines, facts = run(tmp_path, models, on_policy=0.5, sampling=sampling, max_steps=10)
    shares = [line["train/on_policy_share"] for line in lines]
    assert {*shares} == {0.0, 1.0}
    own = [line for line in lines if line["train/on_policy_share"]]
    assert all(0 < line["train/answer_tokens"] <= 12 and line["train/generation_s"] > 0 for line in own)
    assert all(0 <= line["train/truncated_share"] <= 1 for line in own)
    assert not any("train/answer_tokens" in line for line in lines if not line["train/on_policy_share"])
    assert facts["method"] == "knowledge distillation, 50% of the steps on its own answers"
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "again"))
    assert run(tmp_path, models, on_policy=0.5, sampling=sampling, max_steps=10)[0] == first
    assert run(tmp_path, models, max_steps=10)[0] != first


def test_the_student_moves_towards_the_teacher_on_its_own_answers(tmp_path, models):
    _, lines, _ = run(tmp_path, models, on_policy=1, sampling={"max_new_tokens": 16}, max_steps=30)
    losses = [line["train/jsd"] for line in lines]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_only_the_last_answer_of_a_conversation_is_the_students(tmp_path, models):
    data = {"use": "jsonl", "source": "./rows.jsonl", "split": "all", "every_turn": True}
    sampling = {"do_sample": False, "max_new_tokens": 1}
    _, lines, _ = run(tmp_path, models, rows=CHATS, data=data, on_policy=1.0, sampling=sampling, max_steps=2)
    assert [line["train/learned_tokens"] for line in lines] == [4, 8]


def test_a_student_with_a_wider_head_says_only_what_the_teacher_can_read(tmp_path, models):
    hot = {"temperature": 50.0, "max_new_tokens": 20}
    _, lines, _ = run(tmp_path, models, model=str(models / "wide"), on_policy=1.0, sampling=hot, max_steps=3)
    assert len(lines) == 3


def test_answers_are_sampled_unless_the_recipe_says_otherwise():
    assert OwnAnswers().do_sample
    assert OwnAnswers(temperature=0.9).max_new_tokens == 128
    assert not OwnAnswers(do_sample=False).do_sample
    assert DistillParams.model_fields["on_policy"].default == 0.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"sampling": {"max_new_tokens": 4}},
            "stages.kd.sampling: the student writes answers only with on_policy above 0",
        ),
        ({"on_policy": 1.5}, "stages.kd.on_policy: must be at most 1, got the number 1.5"),
        (
            {"on_policy": 0.5, "losses": [{"use": "jsd"}, {"use": "cross-entropy"}]},
            "stages.kd.losses.1.use: 'cross-entropy' needs no teacher",
        ),
        (
            {"on_policy": 0.5, "losses": [{"use": "uld"}]},
            "stages.kd.losses.0.use: 'uld' compares the texts of the data, which are aligned before training",
        ),
        (
            {"on_policy": 0.5, "teacher": {"use": "stored"}},
            "stages.kd.teacher.use: 'stored' knows only the data's answers, and on_policy asks about the student's own",
        ),
    ],
)
def test_what_on_policy_refuses(tmp_path, models, values, expected):
    (problem,) = problems(tmp_path, models, **values)
    assert problem.startswith(expected)
    assert all(problem.line for problem in kdkit.validate(tmp_path / "recipe.yaml"))


def test_the_default_losses_are_refused_where_the_stage_stands(tmp_path, models):
    file = recipe(tmp_path, models, on_policy=0.5)
    text = json.loads(file.read_text())
    del text["stages"]["kd"]["losses"]
    file.write_text(json.dumps(text, indent=1))
    (problem,) = kdkit.validate(file)
    assert problem.message.startswith("'cross-entropy' needs no teacher")
    assert problem.line


def test_a_teacher_with_fixed_rows_serves_a_stage_without_on_policy(tmp_path, models):
    assert problems(tmp_path, models, teacher={"use": "stored"}) == []

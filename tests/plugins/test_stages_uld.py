from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_stages import ROWS, distill, problems, run

from kdkit.api import LossSpec, Params
from kdkit.plugins.stages.checks import check_distill
from kdkit.plugins.stages.training import _terms
from kdkit.testing.tiny import save_tiny_model, tiny_piece_tokenizer

ULD = {"use": "uld"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A student of bytes, a teacher with pieces of several characters, its own template and a wider head."""
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "student", layers=2, seed=2)
    save_tiny_model(root / "teacher", layers=3, seed=1, vocab=400, tokenizer=tiny_piece_tokenizer())
    return root


def curve(result, stage: str, key: str) -> list[float]:
    return [line[key] for line in result.stage(stage).metrics() if key in line]


def test_a_student_learns_from_a_teacher_with_another_tokenizer(tmp_path, models):
    data = {"use": "jsonl", "source": "./rows.jsonl", "split": "test", "test_fraction": 0.2}
    stage = distill(models, losses=[ULD], max_steps=30, logging_steps=1, eval_data=data, eval_steps=10)
    result = run(tmp_path, {"kd": stage})
    assert result.ok, result.error
    values, held_out = curve(result, "kd", "train/uld"), curve(result, "kd", "eval/uld")
    assert len(values) == 30
    assert 0 < values[-1] < 0.6 * values[0] < 2
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]


def test_tokens_and_groups_are_averaged_apart(tmp_path, models):
    losses = [{**ULD, "weight": 0.7}, {"use": "cross-entropy", "weight": 0.3}]
    both = run(tmp_path, {"kd": distill(models, losses=losses, logging_steps=1, learning_rate=1e-9)})
    parts = [curve(both, "kd", f"train/{name}") for name in ("uld", "cross-entropy")]
    total = [0.7 * u + 0.3 * c for u, c in zip(*parts, strict=True)]
    assert curve(both, "kd", "train/loss") == pytest.approx(total, rel=1e-5)
    for losses, values in (([ULD], parts[0]), ([{"use": "cross-entropy"}], parts[1])):
        teacherless = {"kind": "sft"} if losses != [ULD] else {}
        stage = distill(models, losses=losses, logging_steps=1, learning_rate=1e-9, **teacherless)
        if teacherless:
            del stage["teacher"]
        alone = run(tmp_path, {"kd": stage})
        assert curve(alone, "kd", "train/loss") == pytest.approx(values, rel=1e-4)
    facts = json.loads((both.stage("kd").outputs["model"].path / "kdkit.json").read_text())
    assert facts["losses"] == {"uld": 0.7, "cross-entropy": 0.3}


def test_the_steps_of_a_run_do_not_depend_on_how_they_are_cut(tmp_path, models):
    curves = []
    for size, padding_free in ((8, True), (2, True), (4, False)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        stage = distill(
            models, losses=[ULD], logging_steps=1, padding_free=padding_free, **{**split, "learning_rate": 1e-3}
        )
        curves.append(curve(run(tmp_path, {"kd": stage}), "kd", "train/uld"))
    assert len(curves[0]) == 6
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0] == pytest.approx(curves[2], rel=1e-4)


def test_divergences_of_a_pair_without_a_common_vocabulary_stay_refused(tmp_path, models):
    result = run(tmp_path, {"kd": distill(models, losses=[{"use": "forward-kl"}])})
    assert not result.ok
    assert "student and teacher have different vocabularies" in str(result.error)


def test_mistakes_are_found_before_it_runs(tmp_path, models):
    mixed = distill(models, losses=[{"use": "forward-kl"}, ULD, {"use": "cross-entropy"}])
    found = problems(tmp_path, {"kd": mixed})
    why = "'forward-kl' needs a teacher of the student's tokens, 'uld' reads it in its own"
    assert found == [f"{why}; use one of them, with cross-entropy if you like"]
    alone = distill(models, losses=[ULD], kind="sft")
    del alone["teacher"]
    assert problems(tmp_path, {"sft": alone}) == ["'uld' needs a teacher; use a distill stage"]


def test_a_teacher_without_a_tokenizer_is_named(tmp_path, models, monkeypatch):
    from kdkit.plugins.teachers import local

    class Mute(local.LocalTeacher):
        def __init__(self, params, ctx):
            super().__init__(params, ctx)
            self.tokenizer = None

    monkeypatch.setattr(local, "LocalTeacher", Mute)
    result = run(tmp_path, {"kd": distill(models, losses=[ULD])})
    assert not result.ok
    assert "the teacher has no tokenizer to read the rows with" in str(result.error)


def test_rows_that_one_side_cannot_hold_are_counted(tmp_path, models):
    # The teacher's pieces are fewer than the student's bytes: it is the student that overflows.
    shortest = min(len(row["prompt"]) + len(row["completion"]) for row in ROWS)
    result = run(tmp_path, {"kd": distill(models, losses=[ULD], max_length=shortest)})
    assert not result.ok
    assert "in the student's tokens" in str(result.error)


def test_the_same_recipe_gives_the_same_bytes(tmp_path, models, monkeypatch):
    import hashlib

    digests = []
    for name in ("a", "b"):
        monkeypatch.setenv("KDKIT_STORE", str(tmp_path / name))
        path = run(tmp_path, {"kd": distill(models, losses=[ULD])}).stage("kd").outputs["model"].path
        digests.append(hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_an_aligned_loss_uses_the_teacher_whatever_it_says_it_needs():
    spec = LossSpec(name="mine", summary="m", params=Params, build=print, loss_kind="aligned", needs=frozenset())
    loss = SimpleNamespace(name="mine", weight=1.0, found=SimpleNamespace(spec=spec))
    teacher = SimpleNamespace(
        found=SimpleNamespace(spec=SimpleNamespace(gives=frozenset({"logits"}), fixed_rows=False))
    )
    given = SimpleNamespace(losses=[loss], teacher=teacher, on_policy=0.0, sampling=None)
    assert list(check_distill(given)) == []
    (term,) = _terms(given, SimpleNamespace(build=lambda component: component), 387)
    assert term.vocabulary == 387, "the memory of a block depends on it"


def test_a_teacher_with_few_positions_is_asked_for_no_more(tmp_path, models, monkeypatch):
    from kdkit.plugins.teachers import local

    class Short(local.LocalTeacher):
        def __init__(self, params, ctx):
            super().__init__(params, ctx)
            self.positions = 8

    monkeypatch.setattr(local, "LocalTeacher", Short)
    result = run(tmp_path, {"kd": distill(models, losses=[ULD])})
    assert not result.ok
    assert "longer than the teacher's 8 positions" in str(result.error)

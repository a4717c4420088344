"""The distill stage with losses of hidden states, as a recipe asks for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from test_stages import distill, problems, recipe, run

import kdkit
from kdkit.api import Params, RecipeError
from kdkit.api.specs import LossSpec, TeacherSpec
from kdkit.plugins.losses.hidden import HiddenCosine, HiddenMSE
from kdkit.testing.tiny import save_tiny_model, tiny_piece_tokenizer

MSE = {"use": "hidden-mse", "weight": 0.01}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "student", layers=2, seed=2)
    save_tiny_model(root / "teacher", layers=4, hidden=48, seed=1)
    save_tiny_model(root / "pieces", layers=2, seed=1, vocab=387, tokenizer=tiny_piece_tokenizer())
    return root


def curve(result, stage: str, key: str) -> list[float]:
    return [line[key] for line in result.stage(stage).metrics() if key in line]


def test_a_student_learns_the_teachers_hidden_states(tmp_path, models):
    from transformers import AutoModelForCausalLM

    losses = [MSE, {"use": "hidden-cosine", "projector": "linear"}, {"use": "cross-entropy", "weight": 0.5}]
    data = {"use": "jsonl", "source": "./rows.jsonl", "split": "test", "test_fraction": 0.2}
    result = run(tmp_path, {"kd": distill(models, losses=losses, max_steps=20, logging_steps=1, eval_data=data)})
    assert result.ok, result.error
    for name in ("hidden-mse", "hidden-cosine", "cross-entropy"):
        values = curve(result, "kd", f"train/{name}")
        assert len(values) == 20
        assert values[-1] < 0.8 * values[0], name
        assert len(curve(result, "kd", f"eval/{name}")) == 1
    path = result.stage("kd").outputs["model"].path
    saved = AutoModelForCausalLM.from_pretrained(path).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(models / "student").state_dict()
    assert {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in plain.items()}


def test_the_student_may_write_the_answers(tmp_path, models):
    sampling = {"max_new_tokens": 6}
    stage = distill(models, losses=[MSE], on_policy=0.5, sampling=sampling, max_steps=4, logging_steps=1)
    result = run(tmp_path, {"kd": stage})
    assert result.ok, result.error
    assert len(curve(result, "kd", "train/hidden-mse")) == 4


def test_steps_do_not_depend_on_how_they_are_cut_and_repeat(tmp_path, models, monkeypatch):
    curves, digests = [], []
    for name, size, padding_free in (("a", 8, True), ("b", 8, True), ("c", 2, True), ("d", 4, False)):
        monkeypatch.setenv("KDKIT_STORE", str(tmp_path / name))
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        values = {**split, "padding_free": padding_free, "learning_rate": 1e-3, "logging_steps": 1, "max_steps": 3}
        result = run(tmp_path, {"kd": distill(models, losses=[MSE], **values)})
        curves.append(curve(result, "kd", "train/hidden-mse"))
        file = result.stage("kd").outputs["model"].path / "model.safetensors"
        digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    for other in curves[1:]:
        assert curves[0] == pytest.approx(other, rel=1e-4)


def test_the_local_teacher_in_bf16_gives_its_hidden_states(tmp_path, models):
    teacher = {"use": "local", "model": str(models / "teacher"), "precision": "bf16"}
    result = run(tmp_path, {"kd": distill(models, losses=[MSE], teacher=teacher, precision="bf16", max_steps=2)})
    assert result.ok, result.error


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        ({**MSE, "projector": "none"}, "student are 32 wide, those of the teacher 48"),
        ({"use": "hidden-cosine"}, "student are 32 wide, those of the teacher 48"),
        ({**MSE, "layers": [[3, 1]]}, "loss hidden-mse: the student has no layer 3"),
        ({**MSE, "layers": [[-1, 5]]}, "loss hidden-mse: the teacher has no layer 5"),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_step(tmp_path, models, loss, why):
    result = run(tmp_path, {"kd": distill(models, losses=[loss])})
    assert not result.ok
    assert why in str(result.error)
    assert "Traceback" not in str(result.error)


def test_another_tokenizer_is_refused(tmp_path, models):
    teacher = {"use": "local", "model": str(models / "pieces")}
    result = run(tmp_path, {"kd": distill(models, losses=[MSE], teacher=teacher)})
    assert "student and teacher have different vocabularies" in str(result.error)
    found = problems(tmp_path, {"kd": distill(models, losses=[{"use": "uld"}, MSE])})
    assert len(found) == 1
    assert found[0].startswith("'hidden-mse' needs a teacher of the student's tokens, 'uld' reads it in its own")


def test_mistakes_are_found_by_validate(tmp_path, models):
    server = {"use": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m", "tokenizer": str(models / "student")}
    found = problems(tmp_path, {"kd": distill(models, losses=[MSE], teacher=server)})
    assert found == ["'hidden-mse' needs hidden states, the teacher gives text, topk"]
    alone = distill(models, losses=[MSE], kind="sft")
    del alone["teacher"]
    assert problems(tmp_path, {"sft": alone}) == ["'hidden-mse' needs a teacher; use a distill stage"]
    empty = problems(tmp_path, {"kd": distill(models, losses=[{**MSE, "layers": []}])})
    assert any("at least one pair [student, teacher], or even, or last" in line for line in empty)
    for layers in ("first", [[1]], [[1, 2, 3]], [["a", 1]]):
        with pytest.raises(RecipeError):
            kdkit.run(recipe(tmp_path, {"kd": distill(models, losses=[{**MSE, "layers": layers}])}), inline=True)


def test_defaults_are_those_of_the_papers():
    mse, cosine = kdkit.build("loss", "hidden-mse"), kdkit.build("loss", "hidden-cosine")
    assert mse == HiddenMSE((), "linear")
    assert cosine == HiddenCosine(((-1, -1),), "none")
    assert mse.projector(8, 12).weight.shape == (12, 8)
    assert mse.projector(8, 12).bias is None
    assert cosine.projector(8, 8) is None
    chosen = kdkit.build("loss", "hidden-mse", layers=[[1, 2], [-1, -1]], projector="none")
    assert chosen.layers == ((1, 2), (-1, -1))


def test_values_by_hand():
    from kdkit.api import RepresentationLossInputs

    own = (torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]], requires_grad=True))
    its = (torch.tensor([[0.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    x = RepresentationLossInputs(own, its)
    # ((1 + 4) / 2 + 1 / 2, 0 + 2 / 2) and (1 + 0, 0 + 1), a zero state being orthogonal to all
    assert HiddenMSE()(x).tolist() == pytest.approx([3.0, 1.0])
    value = HiddenCosine()(x)
    assert value.tolist() == pytest.approx([1.0, 1.0])
    value.sum().backward()
    assert torch.isfinite(own[1].grad).all()


def test_a_plugins_loss_of_hidden_states_needs_them_whatever_it_says():
    from kdkit.plugins.stages.checks import _needs, uses_teacher

    spec = LossSpec(name="mine", summary="m", params=Params, build=print, loss_kind="representation")
    assert uses_teacher(spec)
    assert _needs(spec) == {"hidden"}
    TeacherSpec(name="mine", summary="m", params=Params, build=print, gives=frozenset({"hidden"}))

"""The loss is what it says, and a recipe can use it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kdkit
from kdkit.api import RecipeError
from kdkit.testing.conformance import TokenLossConformance
from kdkit.testing.tiny import save_tiny_model

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import TokenLoss

RECIPE = Path(__file__).parents[1] / "recipe.yaml"


class TestFocalKL(TokenLossConformance):
    gamma = 2.0

    def build(self, temperature: float = 1.0) -> TokenLoss:
        return kdkit.build("loss", "focal-kl", gamma=self.gamma, temperature=temperature)

    def reference(self, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
        p, q = teacher.softmax(-1), student.softmax(-1)
        kl = (p * (p.log() - q.log())).sum(-1)
        return (1 - (-kl).exp()) ** self.gamma * kl


class TestFocalKLWithARoot(TestFocalKL):
    gamma = 1.5


def test_a_weight_that_has_no_gradient_at_equality_is_refused() -> None:
    with pytest.raises(RecipeError, match="gamma"):
        kdkit.build("loss", "focal-kl", gamma=0.5)


def test_the_recipe_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKIT_STORE", str(tmp_path / "store"))
    tiny = str(save_tiny_model(tmp_path / "tiny"))
    short = {"stages.kd.max_steps": 2, "stages.kd.per_device_train_batch_size": 2, "stages.kd.max_length": 1024}
    result = kdkit.run(RECIPE, var={"teacher": tiny, "student": tiny}, set=short, out=tmp_path)
    assert result.ok, result.error

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kdkit.testing.conformance import TokenLossConformance

from kdkit_acme import plugin

if TYPE_CHECKING:
    from kdkit.api import TokenLoss
    from torch import Tensor

(SPEC,) = plugin.kdkit_losses()


class TestLoss(TokenLossConformance):
    # The value at temperature T is T to this power times the formula for logits / T.
    temperature_power: ClassVar[int | None] = 0

    def build(self, temperature: float = 1.0) -> TokenLoss:
        loss: TokenLoss = SPEC.build(SPEC.params(temperature=temperature))
        return loss

    def reference(self, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
        del labels
        p, q = teacher.softmax(-1), student.softmax(-1)
        return 1 - (p * q).sqrt().sum(-1)

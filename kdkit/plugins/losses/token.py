"""Token losses: mathematics for a block of N valid tokens, one value per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdkit.train.divergences import forward_kl, log_classes, upcast

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import TokenLossInputs

__all__ = ["ForwardKL", "cross_entropy"]


def cross_entropy(x: TokenLossInputs, /) -> Tensor:
    """-log q(label), [N], in nats."""
    return torch.nn.functional.cross_entropy(upcast(x.student_logits), x.labels, reduction="none")


@dataclass(frozen=True, slots=True)
class ForwardKL:
    """T^2 KL(softmax(z_teacher / T) || softmax(z_student / T)), [N], in nats.

    The paper's distillation term (its equation 3, T = 1) with the teacher's entropy kept, so that 0 means equality.
    Hinton et al. 2015 for the factor T^2.
    """

    temperature: float = 1.0

    def __call__(self, x: TokenLossInputs, /) -> Tensor:
        """One value per token. Raises ``ConformanceError`` without a matching teacher signal."""
        log_p, log_q = log_classes(x, self.temperature)
        return self.temperature**2 * forward_kl(log_p, log_q)

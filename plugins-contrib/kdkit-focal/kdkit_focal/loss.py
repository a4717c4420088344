"""The mathematics, for a block of N tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdkit.train.divergences import forward_kl, log_classes

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import TokenLossInputs


@dataclass(frozen=True, slots=True)
class FocalKL:
    """T^2 (1 - exp(-KL))^gamma KL with KL = KL(teacher || student) at temperature T, [N], in nats.

    The focal loss of Lin et al. 2017 is (1 - p)^gamma times a cross-entropy of -log p. Here the divergence takes the
    place of the cross-entropy, so that the weight is 0 where the student says what the teacher says, and 1 far away.
    """

    gamma: float = 2.0
    temperature: float = 1.0

    def __call__(self, x: TokenLossInputs, /) -> Tensor:
        """One value per token. Raises ``ConformanceError`` without a matching teacher signal."""
        kl = forward_kl(*log_classes(x, self.temperature))
        # Of equal models rounding may leave a divergence just below zero.
        weight = -torch.expm1(-kl.clamp_min(0))
        return self.temperature**2 * weight**self.gamma * kl

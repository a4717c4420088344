"""The formula, for a block of tokens: kdkit cuts blocks, weighs tokens and shifts labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from kdkit.train.divergences import log_classes

if TYPE_CHECKING:
    from kdkit.api import TokenLossInputs
    from torch import Tensor


class AcmeLoss:
    """1 - sum of sqrt(p q): 0 where the models agree, 1 where they share no token.

    Args:
        temperature: Softmax temperature of both models.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, x: TokenLossInputs, /) -> Tensor:
        """One value per token, [N]."""
        # Both [N, C]. C is the vocabulary, or the teacher's most probable tokens and one class for
        # all others. Signals that do not fit are refused there.
        log_p, log_q = log_classes(x, self._temperature)
        return 1 - torch.exp((log_p + log_q) / 2).sum(-1)

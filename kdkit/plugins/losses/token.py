"""Token losses: mathematics for a block of N valid tokens, one value per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdkit.train.divergences import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    log_classes,
    log_mixture,
    reverse_kl,
    total_variation,
    upcast,
)

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import TokenLossInputs

__all__ = ["JSD", "AdaptiveKL", "ForwardKL", "ReverseKL", "SkewKL", "SkewReverseKL", "TotalVariation", "cross_entropy"]


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


@dataclass(frozen=True, slots=True)
class ReverseKL:
    """T^2 KL(softmax(z_student / T) || softmax(z_teacher / T)), [N], in nats.

    The token term of MiniLLM (Gu et al. 2024, its single-step part), and GKD's divergence at beta = 1.
    """

    temperature: float = 1.0

    def __call__(self, x: TokenLossInputs, /) -> Tensor:
        """One value per token. Raises ``ConformanceError`` without a matching teacher signal."""
        return self.temperature**2 * reverse_kl(*log_classes(x, self.temperature))


@dataclass(frozen=True, slots=True)
class JSD:
    """T^2 times the generalised Jensen-Shannon divergence of Agarwal et al. 2024 (GKD), [N], in nats.

    ``beta`` is the teacher's share of the mixture; 0 and 1 are forward and reverse KL, as in TRL. ``normalized``
    divides by beta (1 - beta), which makes those two the limits and keeps the scale: without it the value at
    beta = 0.01 is a hundredth of that at 0.
    """

    beta: float = 0.5
    normalized: bool = False
    temperature: float = 1.0

    def __call__(self, x: TokenLossInputs, /) -> Tensor:
        """One value per token. Raises ``ConformanceError`` without a matching teacher signal."""
        return self.temperature**2 * self._divergence(*log_classes(x, self.temperature))

    def _divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.beta == 0:
            return forward_kl(log_p, log_q)
        if self.beta == 1:
            return reverse_kl(log_p, log_q)
        scale = self.beta * (1 - self.beta) if self.normalized else 1.0
        return jensen_shannon(log_p, log_q, self.beta) / scale


@dataclass(frozen=True, slots=True)
class SkewKL:
    """T^2 KL(p || alpha p + (1 - alpha) q), [N], in nats: p the teacher, q the student, both at temperature T.

    Ko et al. 2024 (DistiLLM), skew KL; alpha = 0 is the forward KL.
    """

    alpha: float = 0.1
    temperature: float = 1.0

    def __call__(self, x: TokenLossInputs, /) -> Tensor:
        """One value per token. Raises ``ConformanceError`` without a matching teacher signal."""
        log_p, log_q = log_classes(x, self.temperature)
        mixed = log_mixture(log_p, log_q, self.alpha) if self.alpha else log_q
        return self.temperature**2 * forward_kl(log_p, mixed)


@dataclass(frozen=True, slots=True)
class SkewReverseKL:
    """T^2 KL(q || alpha q + (1 - alpha) p), [N], in nats: p the teacher, q the student, both at temperature T.

    Ko et al. 2024 (DistiLLM), skew reverse KL; alpha = 0 is the reverse KL.
    """

    alpha: float = 0.1
    temperature: float = 1.0

    def __call__(self, x: TokenLossInputs, /) -> Tensor:
        """One value per token. Raises ``ConformanceError`` without a matching teacher signal."""
        log_p, log_q = log_classes(x, self.temperature)
        mixed = log_mixture(log_q, log_p, self.alpha) if self.alpha else log_p
        return self.temperature**2 * forward_kl(log_q, mixed)


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """T^2 times forward and reverse KL, mixed by where teacher and student differ, [N], in nats.

    Wu et al. 2024 (AKL): the forward KL fits the teacher's head first, the reverse KL its tail, so each is weighted by
    the gap in its part; see :func:`kdkit.train.divergences.adaptive_kl` for the rule. The tail bucket of a top-k
    signal is one class.
    """

    head_mass: float = 0.5
    temperature: float = 1.0

    def __call__(self, x: TokenLossInputs, /) -> Tensor:
        """One value per token. Raises ``ConformanceError`` without a matching teacher signal."""
        return self.temperature**2 * adaptive_kl(*log_classes(x, self.temperature), self.head_mass)


@dataclass(frozen=True, slots=True)
class TotalVariation:
    """Half the sum over the vocabulary of |p - q|, [N]: Wen et al. 2023 (f-divergence distillation).

    A bounded distance: no factor T^2.
    """

    temperature: float = 1.0

    def __call__(self, x: TokenLossInputs, /) -> Tensor:
        """One value per token. Raises ``ConformanceError`` without a matching teacher signal."""
        return total_variation(*log_classes(x, self.temperature))

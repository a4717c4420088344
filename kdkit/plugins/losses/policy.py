"""Policy losses of distillation: whole completions of the student's own, one value per token.

The notation is that of docs/methods/minillm.md: rho_t = q(y_t) / q_old(y_t), A_t the advantage, w_t the importance
weight of sampling from a mixture with the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdkit.api.data import PolicyLossOutput
from kdkit.api.errors import ConformanceError

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import PolicyLossInputs

__all__ = ["MiniLLM", "OnPolicyReverseKL", "Surrogate", "drift", "importance", "log_ratio", "required"]


def required(values: Tensor | None, what: str) -> Tensor:
    """The values without gradient.

    Raises:
        ConformanceError: The stage did not give them.
    """
    if values is None:
        raise ConformanceError(f"this policy loss needs the {what}", hint="use it in a stage that has them")
    return values.detach()


def log_ratio(x: PolicyLossInputs) -> Tensor:
    """The logarithm of rho, [B, T]; 0 where the mask is False, whatever stands there."""
    return torch.where(x.mask, x.logprobs, 0.0) - torch.where(x.mask, x.old_logprobs.detach(), 0.0)


@dataclass(frozen=True, slots=True)
class Surrogate:
    """PPO's pessimistic surrogate max(-A rho, -A clip(rho)).

    Attributes:
        per_token: The values.
        below: 1.0 where the ratio is below the range and the value therefore has no gradient.
        above: The same above the range.
    """

    per_token: Tensor
    below: Tensor
    above: Tensor

    @classmethod
    def of(
        cls, ratio: Tensor, advantages: Tensor, low: float | None, high: float | None, cap: float | None = None
    ) -> Surrogate:
        """Clip ``ratio`` to [low, high]; None for no bound.

        ``cap`` bounds what the unclipped branch multiplies a negative advantage by (dual-clip PPO, Ye et al. 2020).
        """
        clipped = ratio if low is None and high is None else ratio.clamp(low, high)
        bounded = ratio if cap is None else ratio.clamp(max=cap)
        zero = torch.zeros_like(advantages)
        below = zero if low is None else ((ratio < low) & (advantages < 0)).to(advantages.dtype)
        above = zero if high is None else ((ratio > high) & (advantages > 0)).to(advantages.dtype)
        return cls(torch.maximum(-advantages * bounded, -advantages * clipped), below, above)


def drift(x: PolicyLossInputs, log_rho: Tensor, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over tokens that count: the ratio, rho - 1 - log rho, which estimates KL(q_old || q), and ``extra``."""
    log_rho = log_rho.detach()
    values = {"ratio": log_rho.exp(), "approx_kl": torch.expm1(log_rho) - log_rho, **extra}
    return {name: torch.where(x.mask, value.detach(), 0.0).sum() for name, value in values.items()}


def importance(x: PolicyLossInputs) -> Tensor:
    """w, 1 without a mixture and where the mask is False."""
    if x.importance_weights is None:
        return torch.ones_like(x.logprobs)
    return torch.where(x.mask, x.importance_weights.detach(), 1.0)


@dataclass(frozen=True, slots=True)
class MiniLLM:
    """max(-A rho w, -A clip(rho w, 1 - c, 1 + c)) per token, mean over the tokens of the step (Gu et al. 2024).

    With ``is_in_clip`` off: w max(-A rho, -A clip(rho, 1 - c, 1 + c)). A and w come from
    :class:`kdkit.train.policy.returns.Estimator`.
    """

    cliprange: float | None = 0.2
    is_in_clip: bool = True

    def __call__(self, x: PolicyLossInputs, /) -> PolicyLossOutput:
        """Values [B, T] and sums of ``ratio``, ``approx_kl`` and ``clip_fraction``."""
        log_rho, weights = log_ratio(x), importance(x)
        advantages = torch.where(x.mask, x.advantages.detach(), 0.0)
        inside, outside = (weights, 1.0) if self.is_in_clip else (1.0, weights)
        low, high = (None, None) if self.cliprange is None else (1 - self.cliprange, 1 + self.cliprange)
        surrogate = Surrogate.of(log_rho.exp() * inside, advantages, low, high)
        metrics = drift(x, log_rho, {"clip_fraction": surrogate.below + surrogate.above})
        return PolicyLossOutput(per_token=surrogate.per_token * outside, aggregation="token-mean", metrics=metrics)


@dataclass(frozen=True, slots=True)
class OnPolicyReverseKL:
    """-w rho A with A_t = coefficient (log p(y_t) - log q_old(y_t)), mean over the tokens of the step.

    Distillation on the student's own answers with discount 0, as it is practised: Thinking Machines' tinker (2025),
    NeMo-RL's on-policy distillation. A token is credited with its own reward only, so that the expectation is the
    gradient of sum_t KL(q_t || p_t) over the states that are visited, not of which states those are.
    """

    coefficient: float = 1.0
    clip: float | None = None

    def __call__(self, x: PolicyLossInputs, /) -> PolicyLossOutput:
        """Values [B, T] and sums of ``ratio``, ``approx_kl``, ``clip_fraction`` and ``advantage``."""
        teacher = required(x.teacher_logprobs, "teacher's log-probabilities")
        gap = torch.where(x.mask, teacher, 0.0) - torch.where(x.mask, x.old_logprobs.detach(), 0.0)
        log_rho, advantages = log_ratio(x), self.coefficient * gap
        low, high = (None, None) if self.clip is None else (1 - self.clip, 1 + self.clip)
        surrogate = Surrogate.of(log_rho.exp(), advantages, low, high)
        clipped = surrogate.below + surrogate.above
        metrics = drift(x, log_rho, {"clip_fraction": clipped, "advantage": advantages})
        return PolicyLossOutput(
            per_token=importance(x) * surrogate.per_token, aggregation="token-mean", metrics=metrics
        )

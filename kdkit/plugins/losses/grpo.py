"""Group relative policy optimisation and its relatives: whole completions, one value per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from kdkit.api.data import PolicyLossOutput
from kdkit.api.errors import ConformanceError
from kdkit.plugins.losses.policy import Surrogate, drift, importance, log_ratio, required

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import PolicyLossInputs

__all__ = ["GRPO"]


@dataclass(frozen=True, slots=True)
class GRPO:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta k3, with rho = q(y_t) / q_old(y_t).

    k3 = exp(d) - 1 - d with d = log ref(y_t) - log q(y_t), which estimates KL(q || ref). What the values are divided
    by is ``loss_type``:

    - ``grpo``: mean over a completion's tokens, mean over completions (Shao et al. 2024, DeepSeekMath).
    - ``dapo``: all tokens of the optimiser step (Yu et al. 2025).
    - ``dr_grpo``: completions times ``constant_length`` (Liu et al. 2025).
    - ``bnpo``: tokens of the micro-batch, whose means count by their completions, so that the gradient depends on how a
      step is cut; equal to ``dapo`` when it is one micro-batch.

    ``importance_sampling_level: sequence`` has one rho per completion, exp(mean_t log rho_t) (GSPO, Zheng et al. 2025).
    ``delta`` bounds rho where A is negative (dual-clip PPO). Importance weights, where there are some, multiply the
    first part.
    """

    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    importance_sampling_level: Literal["token", "sequence"] = "token"
    delta: float | None = None
    constant_length: int | None = None

    def __call__(self, x: PolicyLossInputs, /) -> PolicyLossOutput:
        """Values [B, T]; sums of ``ratio``, ``approx_kl``, ``clip_low``, ``clip_high``, and with beta of ``ref_kl``."""
        log_rho = log_ratio(x)
        advantages = torch.where(x.mask, x.advantages.detach(), 0.0)
        ratio = self._level(log_rho, x.mask).exp()
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        surrogate = Surrogate.of(ratio, advantages, 1 - self.epsilon, 1 + high, self.delta)
        extra = {"clip_low": surrogate.below, "clip_high": surrogate.above}
        per_token = importance(x) * surrogate.per_token
        if self.beta:
            distance = _k3(x)
            per_token = per_token + self.beta * distance
            extra["ref_kl"] = distance
        return self._aggregated(per_token, x.mask, drift(x, log_rho, extra))

    def _level(self, log_rho: Tensor, mask: Tensor) -> Tensor:
        if self.importance_sampling_level == "token":
            return log_rho
        mean = log_rho.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp_min(1)
        return mean.expand_as(log_rho)

    def _aggregated(self, per_token: Tensor, mask: Tensor, metrics: dict[str, Tensor]) -> PolicyLossOutput:
        if self.loss_type == "grpo":
            return PolicyLossOutput(per_token=per_token, aggregation="sequence-mean", metrics=metrics)
        if self.loss_type == "dapo":
            return PolicyLossOutput(per_token=per_token, aggregation="token-mean", metrics=metrics)
        length: int | None = self.constant_length
        if self.loss_type == "bnpo":
            # Divided by the completions of the step, this is the mean over micro-batches of their token means.
            counted = mask.any(dim=1).sum()
            per_token, length = per_token * counted / mask.sum().clamp_min(1), 1
        if length is None:
            raise ConformanceError("dr_grpo divides by a constant length", hint="set constant_length")
        return PolicyLossOutput(
            per_token=per_token, aggregation="constant-length", constant_length=length, metrics=metrics
        )


def _k3(x: PolicyLossInputs) -> Tensor:
    reference = required(x.ref_logprobs, "reference's log-probabilities")
    gap = torch.where(x.mask, reference, 0.0) - torch.where(x.mask, x.logprobs, 0.0)
    return torch.expm1(gap) - gap

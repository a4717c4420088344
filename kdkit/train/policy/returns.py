"""What every token of a completion is credited with: MiniLLM's rewards, weights and returns.

Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models". The sequence-level reverse KL
E_{y~q} sum_t log q_t - log p_t has the gradient -E_{y~q} sum_t G_t grad log q_t with G_t = sum_{k>=t} r_k and
r_k = log p_k - log q_k. docs/methods/minillm.md derives it, with what the single-step term and a mixture that samples
change in it.

All tensors are [B, T], completions padded on the right, with a bool mask that is True at the tokens that count. Results
are float64, without gradient, and neutral where the mask is False: 0, and 1 for weights. Log-probabilities are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import torch

from kdkit.api.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "RULED_OUT",
    "Estimate",
    "Estimator",
    "SumRanks",
    "cumulative_weights",
    "discounted_returns",
    "mixture_weights",
    "rewards",
    "whiten",
]

SumRanks: TypeAlias = "Callable[[Tensor], Tensor]"
"""Sums a small float64 tensor over all ranks."""

_EPSILON: Final = 1e-8
RULED_OUT: Final = "an advantage is not finite: the teacher rules out a token that was sampled"
"""What is wrong with a log-probability of -inf under the teacher."""


def _one_rank(sums: Tensor) -> Tensor:
    return sums


def rewards(
    teacher: Tensor, old: Tensor, mask: Tensor, *, scaling: float | None = None, clip: float | None = None
) -> Tensor:
    """r_t = log p(y_t) - log q_old(y_t), divided by ``scaling`` and then clipped to [-clip, clip].

    Args:
        teacher: Log-probabilities of the taken tokens under the teacher, log p.
        old: Under the student that sampled, log q_old.
        mask: True at tokens that count.
        scaling: Divisor; 0.5 doubles the rewards. None leaves them.
        clip: Bound of a token's reward; None leaves them.
    """
    raw = torch.where(mask, teacher.double() - old.double(), 0.0).detach()
    scaled = raw if scaling is None else raw / scaling
    return scaled if clip is None else scaled.clamp(-clip, clip)


def mixture_weights(teacher: Tensor, old: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """w_t = q_t / ((1 - alpha) q_t + alpha p_t), between 0 and 1 / (1 - alpha): one token's importance weight.

    ``alpha`` is the teacher's share of the mixture that sampled. Only the difference of the log-probabilities is used,
    so that tokens which are next to impossible under one model or both have a weight like all others.
    """
    gap = torch.where(mask, teacher.double() - old.double(), 0.0).detach()
    if alpha == 0:
        return torch.ones_like(gap)
    log_share = torch.logaddexp(gap.new_tensor(math.log1p(-alpha)), math.log(alpha) + gap)
    return torch.exp(-log_share)


def cumulative_weights(weights: Tensor, *, inclusive: bool = True) -> Tensor:
    """W_t = prod_{i<=t} w_i; without ``inclusive`` the product over i < t, which is 1 at the first token."""
    logs = weights.log()
    products = logs.cumsum(dim=1).exp()
    if inclusive:
        return products
    return torch.cat([torch.ones_like(products[:, :1]), products[:, :-1]], dim=1)


def discounted_returns(
    values: Tensor, mask: Tensor, *, gamma: float = 1.0, first: Literal["own", "next"] = "own", normalize: bool = False
) -> Tensor:
    """G_t = sum_{k>=s} gamma^(k-s) values_k.

    Args:
        values: Rewards; 0 where the mask is False.
        mask: True at tokens that count.
        gamma: Discount per token.
        first: Where the sum begins: at s = t (``own``), or at s = t + 1 (``next``), which leaves a token's own reward
            to the single-step term.
        normalize: Divide by the number of tokens that count from s on, however they are discounted. Nothing is left to
            sum after the last token; its G is 0.
    """
    width = values.shape[1]
    total = torch.zeros_like(values[:, 0])
    sums = []
    for step in range(width - 1, -1, -1):
        total = values[:, step] + gamma * total
        sums.append(total)
    returns = torch.stack(sums[::-1], dim=1)
    remaining = mask.double().flip(1).cumsum(dim=1).flip(1)
    if first == "next":
        zero = torch.zeros_like(returns[:, :1])
        returns, remaining = (torch.cat([x[:, 1:], zero], dim=1) for x in (returns, remaining))
    if normalize:
        returns = returns / remaining.clamp_min(1)
    return torch.where(mask, returns, 0.0)


def whiten(
    values: Tensor,
    mask: Tensor,
    mode: Literal["valid", "paper", "none"] = "valid",
    *,
    width: int | None = None,
    sum_ranks: SumRanks = _one_rank,
) -> Tensor:
    """(A - mean) / sqrt(variance + 1e-8), the biased variance, over the completions of all ranks.

    Args:
        values: Advantages; 0 where the mask is False.
        mask: True at tokens that count.
        mode: Over tokens that count (``valid``), or over every position of ``width``, padding with its zeros included,
            as the original does (``paper``); ``none`` returns the values.
        width: Positions of a padded completion in ``paper``; T by default. The original pads to the longest completion
            that may be sampled, so that the result does not depend on how long the others are.
        sum_ranks: Sums [3] (count, sum, sum of squares) over ranks. Called once by every rank unless the mode is
            ``none``.

    Returns:
        The same shape. Only in ``paper``, positions that do not count have a value other than 0, which no loss sees.
    """
    if mode == "none":
        return values
    places = values.shape[0] * (width or values.shape[1]) if mode == "paper" else int(mask.sum())
    kept = torch.where(mask, values, 0.0)
    count, total, squares = sum_ranks(torch.stack([kept.new_tensor(float(places)), kept.sum(), kept.square().sum()]))
    mean = total / count.clamp_min(1)
    variance = (squares / count.clamp_min(1) - mean.square()).clamp_min(0)
    whitened = (kept - mean) * torch.rsqrt(variance + _EPSILON)
    return whitened if mode == "paper" else torch.where(mask, whitened, 0.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a policy term and the single-step term beside it are given; [B, T] float64.

    Attributes:
        advantages: Per token.
        importance_weights: For the policy loss to multiply its ratio by; None for 1.
        token_weights: Factors of the single-step term; None for 1.
        rewards: Scaled and clipped, for the log.
    """

    advantages: Tensor
    importance_weights: Tensor | None
    token_weights: Tensor | None
    rewards: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """MiniLLM's estimate of the gradient, from log-probabilities to advantages and weights.

    Attributes:
        alpha: The teacher's share of the mixture that sampled.
        gamma: Discount of the rewards.
        reward_scaling: Divides the rewards; None leaves them.
        cliprange_reward: Bounds them afterwards; None leaves them.
        length_normalization: Divide every return by the number of tokens it sums over.
        single_step_decomposition: The exact reverse KL of every visited distribution is a loss of its own beside this
            one. Returns then start after the token, unless ``parity`` is ``code``.
        parity: ``paper``: returns leave a token's own reward to the single-step term, which has the token's importance
            weight. ``code``: as the authors' code does it, they count it again, and the term has no weight. Both are
            the same without the term.
        importance: ``token``: a token's advantage and single-step term know only its own weight, which is biased.
            ``per-decision``: every reward has the product of the weights of all tokens up to it, and the single-step
            term that of all tokens before it, whatever ``parity`` says, which is not biased.
        whiten: See :func:`whiten`.
        width: See :func:`whiten`.
    """

    alpha: float = 0.0
    gamma: float = 0.95
    reward_scaling: float | None = None
    cliprange_reward: float | None = None
    length_normalization: bool = True
    single_step_decomposition: bool = True
    parity: Literal["paper", "code"] = "paper"
    importance: Literal["token", "per-decision"] = "token"
    whiten: Literal["valid", "paper", "none"] = "valid"
    width: int | None = None

    def __call__(self, teacher: Tensor, old: Tensor, mask: Tensor, sum_ranks: SumRanks = _one_rank) -> Estimate:
        """Advantages and weights of completions [B, T].

        Args:
            teacher: Log-probabilities of the taken tokens under the teacher.
            old: Under the student that sampled.
            mask: True at tokens that count.
            sum_ranks: See :func:`whiten`.

        Raises:
            StageError: An advantage is not finite.
        """
        own = rewards(teacher, old, mask, scaling=self.reward_scaling, clip=self.cliprange_reward)
        weights = mixture_weights(teacher, old, mask, self.alpha) if self.alpha else None
        credited = own
        if weights is not None and self.importance == "per-decision":
            credited = torch.where(mask, cumulative_weights(weights) * own, 0.0)
        later = self.single_step_decomposition and self.parity == "paper"
        returns = discounted_returns(
            credited, mask, gamma=self.gamma, first="next" if later else "own", normalize=self.length_normalization
        )
        advantages = whiten(returns, mask, self.whiten, width=self.width, sum_ranks=sum_ranks)
        if not bool(torch.isfinite(advantages).all()):
            raise StageError(
                f"{RULED_OUT}, or products of importance weights overflow",
                hint="set cliprange_reward, or use importance: token",
            )
        return Estimate(advantages, *self._weights(weights, mask), own)

    def _weights(self, weights: Tensor | None, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Importance weights of the policy loss, and weights of the single-step term."""
        if weights is None:
            return None, None
        if self.importance == "per-decision":
            before = torch.where(mask, cumulative_weights(weights, inclusive=False), 1.0)
            return None, before if self.single_step_decomposition else None
        weighted = self.single_step_decomposition and self.parity == "paper"
        return weights, weights if weighted else None

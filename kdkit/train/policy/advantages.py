"""GRPO's advantages: a completion's reward next to those of the other completions of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GroupAdvantages", "group_advantages"]

_EPSILON: Final = 1e-4
_EQUAL: Final = 1e-8


@dataclass(frozen=True, slots=True)
class GroupAdvantages:
    """Advantages of N completions in G groups, and how many groups teach nothing.

    Attributes:
        values: [N] float64; 0 for completions without a reward and in groups that teach nothing.
        means: [G] mean reward of every group in the order of ``group_ids``; NaN where nothing has a reward.
        group_ids: [G] the distinct groups, ascending.
        zero_variance: [G] bool: two or more completions have a reward, all the same one.
        too_few: [G] bool: fewer than two completions have a reward.
        unscorable: Number of completions without a reward.
    """

    values: Tensor
    means: Tensor
    group_ids: Tensor
    zero_variance: Tensor
    too_few: Tensor
    unscorable: int


def group_advantages(
    rewards: Tensor, groups: Tensor, scale: Literal["group", "batch", "none"] = "group"
) -> GroupAdvantages:
    """A_i = (r_i - mean of its group) / (std + 1e-4), where std has Bessel's correction.

    Shao et al. 2024 (DeepSeekMath), equation 21; the constant and the handling of missing rewards are TRL's.

    Args:
        rewards: [N] rewards of the completions of all ranks; NaN for one that could not be judged. It enters neither
            mean nor standard deviation, and its own advantage is 0.
        groups: [N] int64 which prompt; groups may be of any size and lie in any order.
        scale: ``group``: the standard deviation of the group. ``batch``: of all rewards. ``none``: no division, which
            does not favour prompts whose rewards differ little (Dr. GRPO, Liu et al. 2025).
    """
    r = rewards.double()
    ids, place = torch.unique(groups, return_inverse=True)
    scored = ~torch.isnan(r)
    kept = torch.where(scored, r, 0.0)

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(len(ids)).index_add(0, place, values)

    counts = summed(scored.double())
    means = summed(kept) / counts
    centred = torch.where(scored, r - means[place], 0.0)
    spread = r.new_zeros(len(ids)).scatter_reduce(0, place, centred.abs(), "amax")
    too_few = counts < 2
    flat = (spread <= _EQUAL) & ~too_few
    values = centred
    if scale == "group":
        deviation = (summed(centred.square()) / (counts - 1).clamp_min(1)).sqrt()
        values = centred / (deviation[place] + _EPSILON)
    elif scale == "batch" and int(scored.sum()) > 1:
        values = centred / (r[scored].std() + _EPSILON)
    # Rounding of a mean of equal rewards is no signal.
    values = torch.where((flat | too_few)[place], 0.0, values)
    return GroupAdvantages(values, means, ids, flat, too_few, int((~scored).sum()))

"""Aligned losses: mathematics for a block of G groups of tokens that cover the same text, one value per group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from kdkit.train.divergences import upcast

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import AlignedLossInputs

__all__ = ["ULD"]


@dataclass(frozen=True, slots=True)
class ULD:
    """sum_i |sort(p_S)_i - sort(p_T)_i|, [G], between 0 and 2; the smaller vocabulary is padded with zeros.

    Boizard et al. 2024 (Universal Logit Distillation): the Wasserstein distance between distributions over two
    vocabularies, all entries of which are equally far apart. The paper compares the i-th tokens of both. Here tokens
    are aligned by their text first, as in GOLD (Hugging Face, 2025), and p of a group of tokens y_1 .. y_k is

    - ``joint``: p(v) = p(v | c) prod_{j >= 2} p(y_j | c, y_1 .. y_{j-1}), where c is all before the group. By the chain
      rule p(y_1) is the probability of these tokens together, whose text may be one token on the other side. The other
      entries are scaled alike: the sum is below 1 for k > 1. This is GOLD's "observed" merge with every factor taken at
      the position that predicts its token. (TRL reads it at the token's own position, which predicts the next one.)
    - ``first``: p(v) = p(v | c), which sums to 1.

    Both models have read the same text where a group begins, so that their predictions there are about the same thing.
    """

    merge: Literal["joint", "first"] = "joint"
    temperature: float = 1.0

    def __call__(self, x: AlignedLossInputs, /) -> Tensor:
        """One value per group; no gradient reaches the teacher."""
        student = self._distribution(x.student_logits, x.student_labels, x.student_groups, x.groups)
        with torch.no_grad():
            teacher = self._distribution(x.teacher_logits, x.teacher_labels, x.teacher_groups, x.groups)
            wanted = _descending(teacher).to(student.dtype)
        own = _descending(student)
        shared = min(own.shape[-1], wanted.shape[-1])
        # Beyond the smaller vocabulary one side is zero, and probabilities are their own distance from it.
        rest = own[:, shared:].sum(-1) + wanted[:, shared:].sum(-1)
        return (own[:, :shared] - wanted[:, :shared]).abs().sum(-1) + rest

    def _distribution(self, logits: Tensor, labels: Tensor, groups: Tensor, count: int) -> Tensor:
        """[G, V] from [N, V] logits whose row i predicts ``labels[i]``, a member of group ``groups[i]``."""
        log_p = torch.log_softmax(upcast(logits) / self.temperature, dim=-1)
        places = torch.arange(len(groups), device=groups.device)
        first = places.new_full((count,), len(groups)).scatter_reduce(0, groups, places, "amin")
        if self.merge == "first" or len(groups) == count:
            return log_p[first].exp()
        taken = log_p.gather(-1, labels[:, None])[:, 0]
        further = taken.masked_fill(first[groups] == places, 0.0)
        log_rest = taken.new_zeros(count).index_add(0, groups, further)
        return (log_p[first] + log_rest[:, None]).exp()


def _descending(probabilities: Tensor) -> Tensor:
    # Stable: equal probabilities keep their order, so that the gradient is the same on every run.
    return probabilities.sort(dim=-1, descending=True, stable=True).values

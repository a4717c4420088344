"""Aligned losses: mathematics for a block of G groups of tokens that cover the same text, one value per group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch

from kdkit.train.divergences import upcast

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import AlignedLossInputs

__all__ = ["ULD"]

_INDEX: Final = 32
"""Bits of a sort key that hold the entry's index; those above it hold its value."""
_LARGEST: Final = 0x7FFFFFFF


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
        if len(groups) == count:
            return torch.log_softmax(self._scaled(logits), dim=-1).exp()
        places = torch.arange(len(groups), device=groups.device)
        first = places.new_full((count,), len(groups)).scatter_reduce(0, groups, places, "amin")
        log_p = torch.log_softmax(self._scaled(logits[first]), dim=-1)
        if self.merge == "first":
            return log_p.exp()
        # Of the further tokens one entry counts: no distribution of theirs is made.
        further = (first[groups] != places).nonzero()[:, 0]
        rows = self._scaled(logits[further])
        taken = rows.gather(-1, labels[further][:, None])[:, 0] - rows.logsumexp(-1)
        log_rest = taken.new_zeros(count).index_add(0, groups[further], taken)
        return (log_p + log_rest[:, None]).exp()

    def _scaled(self, logits: Tensor) -> Tensor:
        wide = upcast(logits)
        return wide if self.temperature == 1 else wide / self.temperature


def _descending(probabilities: Tensor) -> Tensor:
    """Every row's probabilities, the largest first, with a gradient where they have one.

    Equal probabilities keep their order, so that the gradient is the same on every run. On a CPU, NumPy sorts float32
    and its bits some ten to thirty times faster than torch, whose sort would take longer than the projection.
    """
    if probabilities.device.type != "cpu" or probabilities.dtype != torch.float32:
        return probabilities.sort(dim=-1, descending=True, stable=True).values
    if not probabilities.requires_grad:
        return torch.from_numpy(np.sort(probabilities.numpy(), axis=-1)).flip(-1)
    values: Tensor = _Ranked.apply(probabilities)
    return values


class _Ranked(torch.autograd.Function):
    """A stable sort, descending, of float32 values of at least 0 on a CPU.

    The bits of such values rise with them: value and index are one integer, which is sorted without a comparison of
    indices.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        bits, width = values.detach().contiguous().numpy().view(np.int32), values.shape[-1]
        ranked, order = np.empty_like(bits), np.empty(bits.shape, dtype=np.int64)
        places = np.arange(width)
        # A row at a time: the keys take twice the memory of the values.
        for source, row, index in zip(bits, ranked, order, strict=True):
            keys = (_LARGEST - source.astype(np.int64)) << _INDEX | places
            keys.sort()
            row[:] = _LARGEST - (keys >> _INDEX)
            np.bitwise_and(keys, (1 << _INDEX) - 1, out=index)
        ctx.save_for_backward(torch.from_numpy(order))
        return torch.from_numpy(ranked.view(np.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (order,) = ctx.saved_tensors
        return torch.empty_like(grad).scatter_(-1, order, grad)

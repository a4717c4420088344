"""Representation losses: mathematics for N tokens with the hidden states of pairs of layers, one value per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from kdkit.api.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api.data import RepresentationLossInputs

__all__ = ["HiddenCosine", "HiddenMSE"]


@dataclass(frozen=True, slots=True)
class _Distance:
    """Pairs of layers, none for the uniform strategy, and the map from the student's width to the teacher's."""

    layers: Sequence[tuple[int, int]] = ()
    projection: Literal["linear", "none"] = "none"

    def projector(self, student_dim: int, teacher_dim: int, /) -> nn.Module | None:
        """A matrix without bias, as in TinyBERT's formula; one for each pair."""
        if self.projection == "linear":
            return nn.Linear(student_dim, teacher_dim, bias=False)
        if student_dim != teacher_dim:
            raise ModelError(
                f"hidden states of the student are {student_dim} wide, those of the teacher {teacher_dim}",
                where="a loss of hidden states without a projector",
                hint="set 'projector: linear' on the loss",
            )
        return None


@dataclass(frozen=True, slots=True)
class HiddenMSE(_Distance):
    """sum over pairs of mean_d (h_S W - h_T)^2, [N].

    Jiao et al. 2020 (TinyBERT), L_hidn (and L_embd for the pair [0, 0]): the mean square over the width of a state,
    every pair with weight 1. The paper's attention maps are not compared.
    """

    def __call__(self, x: RepresentationLossInputs, /) -> Tensor:
        """One value per token; no gradient reaches the teacher."""
        pairs = zip(x.student, x.teacher, strict=True)
        return torch.stack([(own - its.detach()).square().mean(-1) for own, its in pairs]).sum(0)


@dataclass(frozen=True, slots=True)
class HiddenCosine(_Distance):
    """sum over pairs of 1 - cos(h_S W, h_T), [N], 0 to 2 for each pair.

    Sanh et al. 2019 (DistilBERT): the cosine embedding loss that aligns the directions of hidden states; there of the
    last layer, without W. A state that is zero has no direction, and counts as orthogonal.
    """

    def __call__(self, x: RepresentationLossInputs, /) -> Tensor:
        """One value per token; no gradient reaches the teacher."""
        pairs = zip(x.student, x.teacher, strict=True)
        return torch.stack([1 - _cosine(own, its.detach()) for own, its in pairs]).sum(0)


def _cosine(own: Tensor, its: Tensor) -> Tensor:
    """[N]; 0, without a gradient, where one of the two is the zero vector and has no direction."""
    norms = own.norm(dim=-1) * its.norm(dim=-1)
    known = norms > 0
    return torch.where(known, (own * its).sum(-1) / torch.where(known, norms, 1.0), 0.0)

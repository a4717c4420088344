"""Groups of tokens of two vocabularies to try aligned losses on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from kdkit.api.data import AlignedLossInputs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SIZES", "cast", "group", "groups", "leaves", "take"]

SIZES: Final = ((1, 2), (3, 1), (1, 1), (2, 2), (1, 1))
"""Tokens of the student and of the teacher in every group."""


def groups(
    sizes: Sequence[tuple[int, int]] = SIZES,
    *,
    seed: int = 0,
    widths: tuple[int, int] = (23, 17),
    spread: float = 2.0,
) -> AlignedLossInputs:
    """Groups with these numbers of tokens, float64 logits of these vocabularies, and all kinds of labels."""
    generator = torch.Generator().manual_seed(seed)
    logits, labels, members = [], [], []
    for side, width in enumerate(widths):
        counts = torch.tensor([pair[side] for pair in sizes])
        members.append(torch.arange(len(sizes)).repeat_interleave(counts))
        rows = int(counts.sum())
        logits.append(spread * torch.randn(rows, width, generator=generator, dtype=torch.float64))
        labels.append(torch.randint(0, width, (rows,), generator=generator))
    (own, its), (mine, theirs), (left, right) = logits, labels, members
    return AlignedLossInputs(own, its, mine, theirs, left, right, len(sizes))


def leaves(x: AlignedLossInputs) -> AlignedLossInputs:
    """The same with new leaves as the student's logits, which have a gradient."""
    return replace(x, student_logits=x.student_logits.detach().clone().requires_grad_())


def cast(x: AlignedLossInputs, dtype: torch.dtype) -> AlignedLossInputs:
    """The same with logits of another dtype."""
    return replace(x, student_logits=x.student_logits.to(dtype), teacher_logits=x.teacher_logits.to(dtype))


def take(x: AlignedLossInputs, chosen: Sequence[int]) -> AlignedLossInputs:
    """Some of the groups, in this order, numbered anew."""
    sides = []
    for members in (x.student_groups, x.teacher_groups):
        places = [(members == number).nonzero()[:, 0] for number in chosen]
        sides.append(
            (torch.cat(places), torch.arange(len(chosen)).repeat_interleave(torch.tensor([*map(len, places)])))
        )
    (own, mine), (its, theirs) = sides
    return AlignedLossInputs(
        x.student_logits[own], x.teacher_logits[its], x.student_labels[own], x.teacher_labels[its],
        mine, theirs, len(chosen),
    )  # fmt: skip


def group(x: AlignedLossInputs, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of student and teacher, and labels of both, of one group."""
    mine, its = x.student_groups == number, x.teacher_groups == number
    return x.student_logits[mine], x.teacher_logits[its], x.student_labels[mine], x.teacher_labels[its]

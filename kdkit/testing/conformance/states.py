"""Hidden states to try representation losses on, with the projectors that the loss asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from kdkit.api.data import RepresentationLossInputs

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import RepresentationLoss

__all__ = ["States", "drawn", "projectors"]


def drawn(seed: int, rows: int, width: int) -> Tensor:
    """[rows, width] float64 numbers, different in every row, whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + 2.0 * torch.randn(rows, width, generator=generator, dtype=torch.float64)


def projectors(loss: RepresentationLoss, widths: Sequence[tuple[int, int]], seed: int = 0) -> list[nn.Module | None]:
    """What the loss gives for these widths, made as the engine does it: from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [loss.projector(*pair) for pair in widths]


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states of pairs of layers, [N, D] each; the student's, which are not projected yet, have a gradient."""

    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]
    maps: tuple[nn.Module, ...]

    @classmethod
    def of(
        cls,
        loss: RepresentationLoss,
        widths: Sequence[tuple[int, int]],
        *,
        rows: int = 6,
        seed: int = 0,
    ) -> States:
        """States in float64, one pair for each of ``widths``."""
        made = [nn.Identity() if module is None else module.double() for module in projectors(loss, widths)]
        own = [drawn(100 * seed + 2 * i, rows, width) for i, (width, _) in enumerate(widths)]
        its = [drawn(100 * seed + 2 * i + 1, rows, width) for i, (_, width) in enumerate(widths)]
        return cls(tuple(state.requires_grad_() for state in own), tuple(its), tuple(made))

    def projected(self) -> tuple[Tensor, ...]:
        """The student's states as the loss sees them."""
        return tuple(project(state) for project, state in zip(self.maps, self.student, strict=True))

    def inputs(self) -> RepresentationLossInputs:
        """What the loss is called with."""
        return RepresentationLossInputs(self.projected(), self.teacher)

    def changed(self, change: Callable[[Tensor], Tensor]) -> States:
        """The same with every state changed, those of the student as new leaves."""
        own = tuple(change(state.detach()).clone().requires_grad_() for state in self.student)
        return replace(self, student=own, teacher=tuple(change(state) for state in self.teacher))

    def at(self, rows: Tensor) -> States:
        """Some of the tokens."""
        return self.changed(lambda state: state[rows])

    def learned(self) -> list[Tensor]:
        """What has a gradient: the student's states, and the parameters of the projectors."""
        return [*self.student, *(p for module in self.maps for p in module.parameters())]

    def gradients(self, value: Tensor, weights: Tensor | None = None) -> list[Tensor]:
        """Of the weighted sum of a value, with respect to what is learned; zero where there is none."""
        assert value.requires_grad, "the value has no gradient"
        total = value.sum() if weights is None else (weights.to(value) * value).sum()
        leaves = self.learned()
        found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]

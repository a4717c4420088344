"""Sums of losses, kept until they are logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.train.objective import Measured

__all__ = ["Sums"]


@dataclass(slots=True)
class Sums:
    """Sums of losses over what they are means of, on this rank; tensors, so that no micro-step waits for the device.

    Attributes:
        values: [all losses] sums.
        counts: For every loss, tokens, groups or sequences.
        metrics: Sums by name, each with its tokens.
    """

    values: Tensor
    counts: list[int]
    metrics: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    @classmethod
    def zero(cls, losses: int, device: torch.device) -> Sums:
        """Of so many losses."""
        return cls(torch.zeros(losses, device=device), [0] * losses)

    def add(self, measured: Measured, first: int) -> None:
        """Add a micro-batch of the stream whose losses start at ``first``."""
        self.values[first : first + len(measured.counts)] += measured.sums
        for index, count in enumerate(measured.counts, first):
            self.counts[index] += count
        self._add_metrics({name: (value, measured.tokens) for name, value in measured.metrics.items()})

    def merge(self, other: Sums) -> None:
        """Add the sums of a step."""
        self.values += other.values
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self._add_metrics(other.metrics)

    def _add_metrics(self, metrics: Mapping[str, tuple[Tensor, int]]) -> None:
        for name, (value, tokens) in metrics.items():
            before, count = self.metrics.get(name, (torch.zeros_like(value), 0))
            self.metrics[name] = before + value, count + tokens

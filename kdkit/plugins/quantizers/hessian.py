"""Second moments of a layer's inputs, gathered from batches without keeping the inputs."""

from __future__ import annotations

from typing import Final, Self

import torch
from torch import Tensor

__all__ = ["Hessian"]

_COLUMNS: Final = 256
"""Columns multiplied at once: what lies below the diagonal, up to half of the work, follows from what lies above."""


class Hessian:
    """The mean of ``x x^T`` over all inputs seen so far; layers with the same inputs share one.

    Args:
        width: Size of an input.
        device: Where inputs are and the sums are kept.
        dtype: Of the sums; bfloat16 inputs multiply exactly in float32.
    """

    def __init__(self, width: int, *, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, width, dtype=dtype, device=device)

    @classmethod
    def like(cls, inputs: Tensor) -> Self:
        """For inputs [.., width] like these; the sums are at least in float32."""
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        return cls(inputs.shape[-1], device=inputs.device, dtype=dtype)

    def add(self, inputs: Tensor) -> None:
        """Add inputs [N, width], of real tokens only."""
        values = inputs.to(self._sum.dtype)
        for start in range(0, values.shape[1], _COLUMNS):
            rows = slice(start, start + _COLUMNS)
            self._sum[rows, start:].addmm_(values[:, rows].T, values[:, start:])
        self.tokens += values.shape[0]

    def value(self) -> Tensor:
        """[width, width] symmetric, in the dtype of the sums; zeros when no input was seen."""
        upper = self._sum.triu()
        return (upper + upper.triu(1).T).div_(max(self.tokens, 1))

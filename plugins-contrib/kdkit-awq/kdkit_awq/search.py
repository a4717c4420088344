"""The search for scales, and how far a rounded layer is from the exact one. Sections and symbols of Lin et al. 2023."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from kdkit.models.quantized.linear import QuantizedLinear

__all__ = ["lost_output", "scales_of", "search"]

_RANGE: Final = 1e3
"""Scales lie between its inverse and it: norms that are divided by them are stored as float16."""
_FLOOR: Final = 1e-4


def scales_of(size: Tensor, alpha: float) -> Tensor:
    """The scale size^alpha with a geometric mean of 1, [width]; all 1 for alpha = 0.

    Args:
        size: [width] the mean of the absolute value of each input.
        alpha: 0 leaves weights as they are, 1 takes all differences between inputs out of them.
    """
    if alpha == 0:
        return torch.ones_like(size)
    logs = alpha * size.clamp_min(_FLOOR * float(size.max())).clamp_min(torch.finfo(size.dtype).tiny).log()
    return (logs - logs.mean()).exp().clamp(1 / _RANGE, _RANGE)


def search(
    weights: Sequence[Tensor],
    size: Tensor,
    sample: Tensor,
    *,
    steps: int,
    exact: Callable[[Tensor], Tensor],
    rounded: Callable[[Tensor], QuantizedLinear],
) -> tuple[Tensor, float]:
    """The scale with the smallest sum of squared errors of the outputs, and its alpha.

    Args:
        weights: [out, width] of every layer that reads the inputs.
        size: [width] the mean of the absolute value of each input.
        sample: [n, width] inputs.
        steps: alpha is 0, 1/steps, ... 1.
        exact: The nearest scale that can be folded away exactly.
        rounded: Rounds a weight.

    Returns:
        Scale [width], all 1 where rounding to nearest is as good, and alpha.
    """
    best, found = float("inf"), (torch.ones_like(size), 0.0)
    for step in range(steps + 1):
        alpha = step / steps
        scale = exact(scales_of(size, alpha)) if step else found[0]
        error = sum(_error(weight, rounded(weight * scale), sample, scale) for weight in weights)
        if error < best:
            best, found = error, (scale, alpha)
    return found


def lost_output(
    weight: Tensor, linear: QuantizedLinear, sample: Tensor, scale: Tensor, rows: Tensor | None = None
) -> float:
    """||X (Q - W)^T||^2 / ||X W^T||^2: what of a layer's outputs is lost, relative to their square.

    Args:
        weight: [out, width] W, as it was.
        linear: Its rounded weight, of which Q follows by undoing both scales.
        sample: [n, width] X.
        scale: [width] by which its columns were multiplied.
        rows: [out] by which its rows were divided, where they were.
    """
    square = float((sample @ weight.T).square().sum())
    return _error(weight, linear, sample, scale, rows) / square if square else 0.0


def _error(weight: Tensor, linear: QuantizedLinear, sample: Tensor, scale: Tensor, rows: Tensor | None = None) -> float:
    """||X (Q - W)^T||^2."""
    effective = linear.dequantized(torch.float32) / scale
    if rows is not None:
        effective = effective * rows.unsqueeze(1)
    return float((sample @ (effective - weight).T).square().sum())

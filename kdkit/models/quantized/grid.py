"""The grid that a group of weights is rounded to: evenly spaced values, ``(code - zero) * scale``.

Shapes: ``out`` rows of a layer's weight, ``n`` or ``width`` of its columns. Scales are rounded to float16, which is
what a checkpoint stores, before anything is rounded with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from kdkit.api.errors import ModelError

__all__ = ["BITS", "GridSettings", "fit_grid", "from_codes", "resolve_group_size", "to_codes"]

BITS: Final = (2, 4, 8)
"""Code widths that divide a 32-bit word; every reader packs 3 bits in a way of its own."""
_AUTO: Final = (128, 64, 32)
_SHRINK_STEPS: Final = 80
_SHRINK_BY: Final = 0.01
_SMALLEST: Final = 2.0**-24
"""Smallest positive float16, subnormal."""
_LARGEST: Final = 65504.0


@dataclass(frozen=True, slots=True)
class GridSettings:
    """How a grid is fitted.

    Attributes:
        bits: Width of a code: 2, 4 or 8.
        sym: The zero point is the middle code, 2^(bits-1); otherwise it is chosen so that the grid spans the weights.
        mse: Exponent of the norm by which narrower grids are compared (2.4), which clip the largest weights to have
            smaller steps; 0 takes the range of the weights as it is.
    """

    bits: int
    sym: bool
    mse: float

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ModelError(f"weights cannot be quantised to {self.bits} bits", allowed="2, 4 or 8")
        if not (self.mse == 0 or 0 < self.mse < math.inf):
            raise ModelError(f"the exponent of the grid search cannot be {self.mse}", allowed="0, or a positive number")


def fit_grid(weight: Tensor, settings: GridSettings) -> tuple[Tensor, Tensor]:
    """The grid of one group.

    Args:
        weight: [out, width] finite weights, float32 or float64.
        settings: See :class:`GridSettings`.

    Returns:
        Scale [out], positive and exact in float16, and zero point [out], an integer in [0, 2^bits - 1]; both in the
        dtype of ``weight``. A group of zeros stays zero.
    """
    low, high = _range(weight, symmetric=settings.sym)
    scale, zero = _grid(low, high, settings)
    if settings.mse:
        _search(weight, low, high, settings, scale, zero)
    return scale, zero


def _range(weight: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Bounds [out] of the weights of a row, zero included."""
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    # A row of zeros has no range; any grid that contains zero represents it.
    empty = low == high
    return low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)


def _grid(low: Tensor, high: Tensor, settings: GridSettings) -> tuple[Tensor, Tensor]:
    top = 2**settings.bits - 1
    scale = ((high - low) / top).clamp(_SMALLEST, _LARGEST).to(torch.float16).to(low.dtype)
    if settings.sym:
        return scale, torch.full_like(scale, 2 ** (settings.bits - 1))
    return scale, torch.round(-low / scale).clamp(0, top)


def _search(weight: Tensor, low: Tensor, high: Tensor, settings: GridSettings, scale: Tensor, zero: Tensor) -> None:
    """Replace grids [out] in place by narrower ones, 1 % at a time, where the sum of |error|^mse is smaller."""
    best = torch.full_like(scale, math.inf)
    for step in range(_SHRINK_STEPS):
        shrink = 1.0 - step * _SHRINK_BY
        narrow, centre = _grid(shrink * low, shrink * high, settings)
        rounded = from_codes(to_codes(weight, narrow, centre, settings.bits), narrow, centre)
        error = rounded.sub_(weight).abs_().pow_(settings.mse).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scale.copy_(torch.where(better, narrow, scale))
        zero.copy_(torch.where(better, centre, zero))


def to_codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, in [0, 2^bits - 1].

    Args:
        weight: [out, n] weights.
        scale: [out] or [out, n] positive scales.
        zero: Zero points of the same shape.
        bits: Width of a code.

    Returns:
        [out, n] integers in the dtype of ``weight``.
    """
    scale, zero = _columns(scale), _columns(zero)
    return torch.round(weight / scale).add_(zero).clamp_(0, 2**bits - 1)


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights [out, n] that ``codes`` stand for: ``(codes - zero) * scale``."""
    return (codes - _columns(zero)) * _columns(scale)


def _columns(values: Tensor) -> Tensor:
    return values.unsqueeze(1) if values.dim() == 1 else values


def resolve_group_size(group_size: int | Literal["auto"], widths: Iterable[int]) -> int:
    """The group size to use for layers of these input widths.

    Args:
        group_size: ``auto`` is 128, 64 or 32, the largest that divides every width; -1 is one group for each row.
        widths: Input widths of all layers that are quantised, at least one.

    Returns:
        A positive number that divides every width, or -1.

    Raises:
        ModelError: It does not divide every width: readers of such a file crash, or read other weights.
    """
    distinct = sorted(set(widths))
    if group_size == -1:
        return -1
    if group_size == "auto":
        found = next((size for size in _AUTO if all(width % size == 0 for width in distinct)), None)
        if found is None:
            raise _refused("neither 128, 64 nor 32 divides", distinct)
        return found
    if group_size < 1 or any(width % group_size for width in distinct):
        raise _refused(f"group_size {group_size} does not divide", distinct)
    return group_size


def _refused(what: str, widths: list[int]) -> ModelError:
    common = math.gcd(*widths)
    sizes = [size for size in range(1, common + 1) if common % size == 0]
    # The largest are the ones of use: groups of 1 or 2 weights save nothing.
    divide = ", ".join(str(size) for size in sizes[::-1][:8])
    return ModelError(
        f"{what} the input widths of the layers ({', '.join(map(str, widths))})",
        allowed=f"{divide}; -1 for one group for each row",
        hint=None if common < _AUTO[-1] else "group_size: auto takes the usual one that fits",
    )

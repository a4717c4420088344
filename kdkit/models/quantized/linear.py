"""One quantised linear layer, and rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kdkit.api.errors import ModelError
from kdkit.models.quantized.grid import GridSettings, fit_grid, resolve_group_size, to_codes

__all__ = ["QuantizedLinear", "group_index", "lost_weight", "round_to_nearest"]

_CHUNK: Final = 2**18
"""Weights fitted at once: the search of the grid makes several copies of them, which should stay in the cache."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLinear:
    """The weight of a linear layer as codes; its bias is not part of it.

    Attributes:
        codes: [out, in] uint8, below 2^bits.
        scales: [out, G] float16, one column for each group.
        zeros: [out, G] uint8, below 2^bits.
        g_idx: [in] int32, the group of every input.
        bits: Width of a code.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the codes stand for, computed in float32 and rounded to ``dtype``."""
        groups = self.g_idx.long()
        # Whole numbers below 2^8 times a float16: exact in float32, so that only the last step rounds.
        weight = self.codes.float().sub_(self.zeros.float()[:, groups])
        return weight.mul_(self.scales.float()[:, groups]).to(dtype)


def lost_weight(weight: Tensor, linear: QuantizedLinear) -> float:
    """The square of what ``linear`` misses of a weight [out, in], relative to the square of the weight."""
    exact = weight.detach().float()
    square = float(exact.square().sum())
    return float((linear.dequantized(torch.float32) - exact).square().sum()) / square if square else 0.0


def group_index(width: int, group_size: int) -> Tensor:
    """[width] int32: the group of every input when groups are ``group_size`` neighbours; -1 is one group."""
    size = width if group_size == -1 else group_size
    return torch.arange(width, dtype=torch.int32).div_(size, rounding_mode="floor")


def round_to_nearest(weight: Tensor, settings: GridSettings, group_size: int) -> QuantizedLinear:
    """Every weight at the nearest point of its group's grid, whatever the layer's inputs are.

    Args:
        weight: [out, in] floating-point weights.
        settings: Of the grids.
        group_size: Inputs that share a grid; it divides ``in``, or is -1 for all of them.

    Raises:
        ModelError: A weight is not finite, or ``group_size`` does not divide the width.
    """
    out, width = weight.shape
    size = resolve_group_size(group_size, [width])
    size = width if size == -1 else size
    if not bool(weight.isfinite().all()):
        raise ModelError("has weights that are not finite")
    # A group is a row of its own, so that all groups of a layer are fitted alike, many at once.
    rows = weight.detach().reshape(-1, size)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows.shape[0], dtype=torch.float16, device=weight.device)
    zeros = torch.empty(rows.shape[0], dtype=torch.uint8, device=weight.device)
    step = max(1, _CHUNK // size)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        values = rows[part].to(torch.promote_types(weight.dtype, torch.float32))
        scale, zero = fit_grid(values, settings)
        codes[part] = to_codes(values, scale, zero, settings.bits).to(torch.uint8)
        scales[part], zeros[part] = scale.to(torch.float16), zero.to(torch.uint8)
    return QuantizedLinear(
        codes=codes.view(out, width),
        scales=scales.view(out, -1),
        zeros=zeros.view(out, -1),
        g_idx=group_index(width, size).to(weight.device),
        bits=settings.bits,
    )

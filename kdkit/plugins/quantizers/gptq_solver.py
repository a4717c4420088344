"""The mathematics of GPTQ for one linear layer.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2023), algorithm 1:
columns of the weight are rounded one after another, and what rounding a column costs is made up for by the columns that
are not rounded yet, as the inputs' second moments H = X^T X say. The objective is tr((W - Q) H (W - Q)^T), the squared
change of the layer's outputs on the calibration tokens. Every row of W is solved on its own, so layers that share their
inputs (query, key and value) are solved as one.

Shapes: ``out`` rows and ``in`` columns of a weight, ``G`` groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from kdkit.api.errors import ModelError
from kdkit.models.quantized.grid import GridSettings, fit_grid, from_codes, to_codes
from kdkit.models.quantized.linear import QuantizedLinear, group_index, round_to_nearest

__all__ = ["Solved", "SolverSettings", "solve", "solve_shared"]

_DAMPING: Final = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares of the mean diagonal that are tried, as far as they are larger, when the one asked for does not suffice."""
_CHUNK: Final = 2**18
"""Weights whose grids are fitted at once: the search makes several copies of them, which should stay in the cache."""


@dataclass(frozen=True, slots=True)
class SolverSettings:
    """How a layer is solved.

    Attributes:
        grid: Bits, symmetry and search of the grids.
        group_size: Neighbouring inputs that share a grid, a divisor of the width; -1 for all of them.
        desc_act: Round the columns with the largest inputs first, when many are left to make up for them.
        static_groups: Fit all grids to the original weights. Otherwise a grid is fitted when its first column is
            reached, to weights that make up for others already; with ``desc_act`` a group is then not of neighbours.
        damp_percent: What is added to the diagonal of H, as a share of its mean.
        block_size: Columns whose effect on the later ones is gathered before it is applied; changes speed only.
    """

    grid: GridSettings
    group_size: int
    desc_act: bool
    static_groups: bool
    damp_percent: float
    block_size: int


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """A quantised layer and how well it does on the calibration tokens.

    Attributes:
        linear: The layer.
        error: tr((W - Q) H (W - Q)^T) / tr(W H W^T), without damping: the share of the output's energy that is lost.
        rtn_error: The same when every weight is rounded to nearest.
        damp: Share of the mean diagonal that was added.
        kept: Which of the two ``linear`` is; the better one.
        note: Why it is not what was asked for; None when it is.
    """

    linear: QuantizedLinear
    error: float
    rtn_error: float
    damp: float
    kept: Literal["gptq", "rtn"]
    note: str | None = None


def solve(weight: Tensor, hessian: Tensor, settings: SolverSettings) -> Solved:
    """Quantise one layer.

    Args:
        weight: [out, in] float32 or float64, the precision in which it is solved.
        hessian: [in, in] second moments of the layer's inputs, to any scale, in the same dtype.
        settings: See :class:`SolverSettings`.

    Raises:
        ModelError: Weights or inputs are not finite, or the group size does not divide the width.
    """
    return solve_shared([weight], hessian, settings)[0]


def solve_shared(weights: Sequence[Tensor], hessian: Tensor, settings: SolverSettings) -> list[Solved]:
    """Quantise layers that share their inputs, each as :func:`solve` does; the factorisation is done once.

    Args:
        weights: [out_i, in] each.
        hessian: [in, in] second moments of the inputs.
        settings: See :class:`SolverSettings`.

    Raises:
        ModelError: As :func:`solve`.
    """
    if not bool(hessian.isfinite().all()):
        raise ModelError(
            "its inputs on the calibration rows are not finite", hint="check the model and the calibration rows"
        )
    weight = torch.cat(list(weights))
    nearest = round_to_nearest(weight, settings.grid, settings.group_size)
    energy = _quadratic(weight, hessian)
    lost_nearest = _quadratic(weight - nearest.dequantized(weight.dtype), hessian)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if settings.desc_act else None
    factor, damp = _factor(hessian, order, settings.damp_percent)
    solved, lost = nearest, lost_nearest
    if factor is not None:
        solved = _compensated(weight, factor, order, nearest, settings)
        lost = _quadratic(weight - solved.dequantized(weight.dtype), hessian)
    results, start = [], 0
    for part in weights:
        rows = slice(start, start + part.shape[0])
        figures = [float(values[rows].sum(dtype=torch.float64)) for values in (lost, lost_nearest, energy)]
        results.append(_better(_rows(solved, rows), _rows(nearest, rows), figures, damp, failed=factor is None))
        start = rows.stop
    return results


def _better(
    solved: QuantizedLinear, nearest: QuantizedLinear, figures: list[float], damp: float, *, failed: bool
) -> Solved:
    lost, lost_nearest, energy = figures
    # A layer without energy has no output on these tokens, and nothing to lose.
    error, rtn_error = (value / energy if energy > 0 else 0.0 for value in (lost, lost_nearest))
    if failed:
        note = f"its second moments are not positive definite even with damping {damp:g}: rounded to nearest"
        return Solved(nearest, rtn_error, rtn_error, damp, "rtn", note)
    # Written so that an overflow keeps what is certain.
    if not lost <= lost_nearest:
        note = f"error {error:.4g} is above {rtn_error:.4g}, that of rounding to nearest, which is kept"
        return Solved(nearest, rtn_error, rtn_error, damp, "rtn", note)
    return Solved(solved, error, rtn_error, damp, "gptq")


def _quadratic(rows: Tensor, hessian: Tensor) -> Tensor:
    """[out] ``r H r^T`` of every row; rounding cannot make it negative."""
    return (rows @ hessian).mul_(rows).sum(1).clamp_min_(0)


def _factor(hessian: Tensor, order: Tensor | None, percent: float) -> tuple[Tensor | None, float]:
    """The upper triangular U with ``inverse(H + damping) = U^T U``, columns in ``order``, and the damping that it took.

    With J the reversal of all columns, ``J H J = L L^T`` gives ``H = V V^T`` with V = J L J upper triangular, so U is
    the inverse of V: one factorisation and one triangular inverse, where inverting H first would take three steps.
    """
    ordered = hessian if order is None else hessian[order][:, order]
    diagonal = ordered.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else diagonal.new_ones(())
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    damp = percent
    for damp in (percent, *(value for value in _DAMPING if value > percent)):
        # An input that is always zero is tied to no other: its weights are rounded to nearest.
        damped = ordered + torch.diag(damp * mean + torch.where(live, 0.0, mean))
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if bool(factor.isfinite().all()):
                return factor, damp
    return None, damp


def _compensated(
    weight: Tensor, factor: Tensor, order: Tensor | None, nearest: QuantizedLinear, settings: SolverSettings
) -> QuantizedLinear:
    """The weight, column after column in ``order``."""
    width, device = weight.shape[1], weight.device
    size = width if settings.group_size == -1 else settings.group_size
    groups = group_index(width, size).to(device)
    order = torch.arange(width, device=device) if order is None else order
    # Transposed, a column of the weight is a row of memory.
    values = weight[:, order].T.contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8, device=device)
    if settings.static_groups:
        grids, g_idx = _Grids.of(nearest, groups[order], weight.dtype), groups
    else:
        grids, g_idx = _Grids.unknown(weight, groups), torch.empty_like(groups)
        g_idx[order] = groups
    for start, stop in _blocks(width, size, settings):
        errors = torch.empty_like(values[start:stop])
        for column in range(start, stop):
            if not settings.static_groups and column % size == 0:
                grids.fit(column // size, values[column : column + size], settings.grid)
            codes[column] = _round(values[column], grids.of_column(column), settings.grid.bits, errors[column - start])
            errors[column - start].div_(factor[column, column])
            values[column + 1 : stop].addr_(factor[column, column + 1 : stop], errors[column - start], alpha=-1)
        values[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return QuantizedLinear(
        codes=restored.T.contiguous(),
        scales=grids.scales.T.to(torch.float16).contiguous(),
        zeros=grids.zeros.T.to(torch.uint8).contiguous(),
        g_idx=g_idx,
        bits=settings.grid.bits,
    )


def _round(values: Tensor, grid: tuple[Tensor, Tensor], bits: int, error: Tensor) -> Tensor:
    """Codes [out] of a column; what they miss goes into ``error`` [out]."""
    column = values.unsqueeze(1)
    codes = to_codes(column, *grid, bits)
    torch.sub(values, from_codes(codes, *grid).squeeze(1), out=error)
    return codes.squeeze(1)


def _blocks(width: int, size: int, settings: SolverSettings) -> Iterator[tuple[int, int]]:
    """Spans of columns to gather the effect of.

    A grid that is fitted on the way has to see weights that make up for all columns before it, those of its own span
    included: there a group lies within a span, or is cut into spans of its own.
    """
    step = settings.block_size
    whole = step if settings.static_groups else max(size, step // size * size)
    for outer in range(0, width, whole):
        end = min(outer + whole, width)
        inner = step if whole == size else whole
        yield from ((start, min(start + inner, end)) for start in range(outer, end, inner))


class _Grids:
    """The grids [G, out] of all groups, and the group of every column in the order of rounding."""

    def __init__(self, scales: Tensor, zeros: Tensor, group_of: Tensor) -> None:
        self.scales, self.zeros = scales, zeros
        self._group_of = group_of.tolist()

    @classmethod
    def of(cls, nearest: QuantizedLinear, group_of: Tensor, dtype: torch.dtype) -> _Grids:
        """Those of the original weights, which rounding to nearest uses as well."""
        return cls(nearest.scales.T.to(dtype).contiguous(), nearest.zeros.T.to(dtype).contiguous(), group_of)

    @classmethod
    def unknown(cls, weight: Tensor, group_of: Tensor) -> _Grids:
        """For groups of columns that follow one another; each is fitted when its first column is reached."""
        shape = (int(group_of[-1]) + 1, weight.shape[0])
        return cls(weight.new_empty(shape), weight.new_empty(shape), group_of)

    def fit(self, group: int, values: Tensor, settings: GridSettings) -> None:
        """Fit a group to its weights [size, out] as they are now."""
        step = max(1, _CHUNK // values.shape[0])
        for start in range(0, values.shape[1], step):
            rows = slice(start, start + step)
            self.scales[group, rows], self.zeros[group, rows] = fit_grid(values[:, rows].T.contiguous(), settings)

    def of_column(self, column: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point [out] of the column that is rounded next."""
        group = self._group_of[column]
        return self.scales[group], self.zeros[group]


def _rows(linear: QuantizedLinear, rows: slice) -> QuantizedLinear:
    return replace(linear, codes=linear.codes[rows], scales=linear.scales[rows], zeros=linear.zeros[rows])

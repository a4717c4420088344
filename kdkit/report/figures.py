"""Numbers as text, without more digits than they carry.

A measured value is rounded to the second significant digit of its interval's longer arm; a number without an interval
gets three significant digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = ["MISSING", "amount", "measured", "number", "p_value", "percent", "share", "size"]

MISSING: Final = "-"
"""Shown where there is no number."""

_TINY: Final = 1e-4


def amount(value: float | None) -> str:
    """A count: exact below 10,000, then three digits with k, M, B (10^3, 10^6, 10^9) or T."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) < 10_000 else _scaled(value, ("", "k", "M", "B", "T"))


def size(value: float | None) -> str:
    """Bytes in decimal units, as disks are sold and Hub pages count."""
    return MISSING if value is None else _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def number(value: float | None, *, sign: bool = False) -> str:
    """Three significant digits, thousands separated; ``sign`` writes the plus as well."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    plus = "+" if sign else ""
    if abs(value) < _TINY:
        return f"{value:{plus}.2e}"
    return _fixed(value, max(2 - _exponent(value, 3), 0), plus)


def measured(value: float | None, ci95: Sequence[float] | None, *, sign: bool = False) -> str:
    """``24.7 ±1.8``; the arm is the longer one where the interval is lopsided."""
    if value is None or ci95 is None:
        return number(value, sign=sign)
    plus = "+" if sign else ""
    arm = max(ci95[1] - value, value - ci95[0])
    if max(abs(value), arm) < _TINY:
        return f"{value:{plus}.1e} ±{arm:.1e}"
    decimals = 1 - _exponent(arm, 2)
    return f"{_fixed(value, decimals, plus)} ±{_fixed(arm, decimals)}"


def percent(value: float | None, ci95: Sequence[float] | None) -> str:
    """A share as a percentage: 0.847 is ``84.7 %``."""
    if value is None:
        return MISSING
    return measured(100 * value, None if ci95 is None else [100 * bound for bound in ci95]) + " %"


def share(part: int, whole: int) -> str:
    """``12 (2.4 %)``; only the count when there is nothing to divide by."""
    if part == 0 or whole == 0:
        return f"{part:,}"
    return f"{part:,} ({number(100 * part / whole)} %)"


def p_value(p: float | None) -> str:
    """Three decimals, four around 0.05 so that the text agrees with the verdict; ``<0.001`` below that."""
    if p is None:
        return MISSING
    if p < 0.001:
        return "<0.001"
    return f"{p:.4f}" if 0.0495 <= p < 0.0505 and p != 0.05 else f"{p:.3f}"


def _exponent(value: float, digits: int) -> int:
    """The power of ten of the first digit, after rounding to ``digits`` digits."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def _fixed(value: float, decimals: int, plus: str = "") -> str:
    """``value`` with ``decimals`` decimals, or rounded to tens, hundreds, ... when that is negative."""
    rounded = round(value, decimals) + 0.0
    return f"{rounded:{plus if rounded else ''},.{max(decimals, 0)}f}"


def _scaled(value: float, units: Sequence[str]) -> str:
    step = min(max(_exponent(value, 3) // 3, 0), len(units) - 1) if value else 0
    scaled = value / 1000**step
    return _fixed(scaled, max(2 - _exponent(scaled, 3), 0) if step else 0) + units[step]

"""Axes of charts: round ticks and their labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kdkit.report.figures import amount
from kdkit.report.html.text import typeset

__all__ = ["Axis"]

_ROUND: Final = (1, 2, 5, 10)


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear axis from the first tick to the last, drawn between two pixel positions.

    Attributes:
        ticks: Round numbers, evenly spaced, at least two.
        start: Where the first tick is drawn.
        end: Where the last one is.
    """

    ticks: tuple[float, ...]
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, *, zero: bool = False, most: int = 6) -> Axis:
        """An axis that covers ``values`` with at most ``most`` ticks; ``zero`` makes it cover 0 as well."""
        covered = [*values, *([0.0] if zero else [])]
        low, high = min(covered), max(covered)
        if low == high:
            room = abs(low) * 0.1 or 1.0
            low, high = low - (0 if zero and low == 0 else room), high + room
        step = _step(low, high, most)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(tuple(index * step for index in range(first, last + 1)), start, end)

    def __call__(self, value: float) -> float:
        """Where ``value`` is drawn."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(self.start + share * (self.end - self.start), 2)

    def label(self, tick: float) -> str:
        """``tick`` with as many decimals as the distance of the ticks asks for."""
        step = self.ticks[1] - self.ticks[0]
        if max(abs(self.ticks[0]), abs(self.ticks[-1])) >= 10_000:
            return typeset(amount(tick))
        if step < 1e-4:
            return typeset(f"{tick:.0e}")
        return typeset(f"{tick + 0.0:,.{max(-math.floor(math.log10(step) + 1e-9), 0)}f}")


def _step(low: float, high: float, most: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that needs at most ``most`` ticks."""
    power = 10.0 ** math.floor(math.log10((high - low) / (most - 1)))
    for factor in _ROUND:
        step = factor * power
        if math.ceil(high / step - 1e-9) - math.floor(low / step + 1e-9) < most:
            return step
    return 20 * power

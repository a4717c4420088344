"""Neighbouring rows of similar length, so that the short ones do not pay for the longest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Span", "spans"]


class Span(NamedTuple):
    """Rows ``start`` to ``stop`` (exclusive), none of them longer than ``width``."""

    start: int
    stop: int
    width: int


def spans(lengths: Sequence[int], slack: float) -> list[Span]:
    """Cut rows into spans, in their order.

    Args:
        lengths: Of the rows.
        slack: A span takes in the next row as long as its rows, filled up to the longest, hold at most this much
            filling: what one more span costs, in the same unit.
    """
    found: list[Span] = []
    start, longest, total = 0, 0, 0
    for row, length in enumerate(lengths):
        wider, sum_ = max(longest, length), total + length
        if wider * (row + 1 - start) - sum_ > slack:
            found.append(Span(start, row, longest))
            start, wider, sum_ = row, length, length
        longest, total = wider, sum_
    return [*found, Span(start, len(lengths), longest)] if lengths else []

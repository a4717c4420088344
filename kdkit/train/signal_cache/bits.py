"""Bits and numbers, without a loop over the numbers: fixed and mixed widths, and unary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kdkit.api.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]

__all__ = ["MAX_WIDTH", "pack_unary", "pack_widths", "read_unary", "read_widths", "segment_starts"]

MAX_WIDTH: Final = 24
"""Widest number: with seven bits of offset it still lies within four bytes."""


def pack_widths(values: Ints, widths: Ints) -> bytes:
    """``values[i]`` in ``widths[i]`` bits each, most significant bit first, filled up to whole bytes."""
    total = int(widths.sum())
    if not total:
        return b""
    owner = np.repeat(np.arange(len(values)), widths)
    place = np.arange(total) - np.repeat(np.cumsum(widths) - widths, widths)
    shift = widths[owner] - 1 - place
    return np.packbits(((values[owner] >> shift) & 1).astype(np.uint8)).tobytes()


def read_widths(data: Bytes, widths: Ints) -> Ints:
    """The numbers that :func:`pack_widths` wrote; ``data`` may go on behind them.

    Raises:
        DataError: There are fewer bits than that.
    """
    ends = np.cumsum(widths)
    total = int(ends[-1]) if len(ends) else 0
    if total > 8 * len(data):
        raise DataError("the bits end too early")
    starts = ends - widths
    padded = np.concatenate([data, np.zeros(4, dtype=np.uint8)]).astype(np.int64)
    first = starts >> 3
    window = (padded[first] << 24) | (padded[first + 1] << 16) | (padded[first + 2] << 8) | padded[first + 3]
    kept: Ints = (window >> (32 - (starts & 7) - widths)) & ((1 << widths) - 1)
    return kept


def pack_unary(values: Ints) -> bytes:
    """Every value as that many zeros and a one, filled up to whole bytes."""
    ends = np.cumsum(values + 1)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    bits[ends - 1] = 1
    return np.packbits(bits).tobytes()


def read_unary(data: Bytes, count: int) -> Ints:
    """The ``count`` values that :func:`pack_unary` wrote.

    Raises:
        DataError: There are fewer, or more.
    """
    bits = np.unpackbits(data)
    # Counted first: places take eight times the room of the bits.
    if (found := int(np.count_nonzero(bits))) != count:
        raise DataError(f"there are {found} numbers where {count} belong")
    ones = np.flatnonzero(bits)
    return np.diff(ones, prepend=-1) - 1


def segment_starts(lengths: Ints) -> Ints:
    """Where each of the segments that lie end to end starts."""
    starts: Ints = np.cumsum(lengths) - lengths
    return starts

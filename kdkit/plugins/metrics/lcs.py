"""Length of the longest common subsequence, exact, with one big integer instead of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = ["lcs_length"]

# Bits handled at once. The masks of one block take at most its square over 16 bytes, whatever the length of the texts.
BLOCK: Final = 4096


def lcs_length(first: Sequence[str], second: Sequence[str], *, block: int = BLOCK) -> int:
    """How many tokens the longest subsequence common to both has.

    The bit-parallel method of Hyyrö (2004): one row of the usual table is an integer that has a 0 where the row's value
    grows, and a row follows from the one before by an addition. The shorter sequence lies along the bits; beyond
    ``block`` of them it is cut, and the carries of the additions are handed on.

    Args:
        first: Tokens.
        second: Tokens.
        block: Bits handled at once, at least 1; changes speed and memory only.
    """
    across, down = sorted((first, second), key=len)
    start = _common(across, down)
    end = _common(across[start:][::-1], down[start:][::-1])
    across, down = across[start : len(across) - end], down[start : len(down) - end]
    length, carries = start + end, bytearray(len(down))
    for left in range(0, len(across), block):
        length += _block(across[left : left + block], down, carries)
    return length


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _block(across: Sequence[str], down: Sequence[str], carries: bytearray) -> int:
    """Growth of the last row within the block; ``carries`` come from the block before and become those of this one."""
    masks: dict[str, int] = {}
    for place, token in enumerate(across):
        masks[token] = masks.get(token, 0) | 1 << place
    width = len(across)
    full = row = (1 << width) - 1
    for step, token in enumerate(down):
        matches = row & masks.get(token, 0)
        total = row + matches + carries[step]
        carries[step] = total >> width
        row = total & full | row ^ matches
    return width - row.bit_count()

"""The signals of one row as bytes.

For every learned token: k, the ids (:mod:`kdkit.train.signal_cache.ids`), the tail's log-odds in 16 bits, and a level
for every kept id. Two rules keep probabilities whole, whatever the rounding:

- the tail's share t is read from its log-odds, in steps of 1/1500, and the kept ids have 1 - t together;
- within it they share in proportion to the cubes of their levels, and a level is the cube root of a probability,
  rounded to ``bits`` bits.

Equal steps of the cube root lie between equal steps of the logarithm, which spend most bits on what is improbable, and
those of the square root, which cost the least for the KL divergence but leave improbable tokens with large errors.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kdkit.api.errors import ConformanceError, DataError
from kdkit.train.signal_cache.bits import MAX_WIDTH, pack_unary, pack_widths, read_unary, read_widths, segment_starts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kdkit.train.signal_cache.ids import IdCode

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]
    Bytes = NDArray[np.uint8]

__all__ = ["MOST_BYTES", "MOST_KEPT", "Kept", "decode_row", "encode_row", "join", "lowest_probability"]

MOST_KEPT: Final = 2**25
"""Kept ids of one row: 512 for each of 65,536 tokens. It bounds the memory that reading a row can take."""
MOST_BYTES: Final = 2**27
"""Bytes of one row."""
_HEAD: Final = struct.Struct("<BBII")
_ODDS: Final = 1500
"""Steps of the tail's log-odds in one nat."""
_MIDDLE: Final = 2**15
_RICE: Final = 4
"""Bits for the number of low bits of a token's levels."""


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What is kept of the teacher for N tokens, end to end.

    Attributes:
        k: [N] int64, how many ids of each token are kept, at least 1.
        ids: [sum(k)] int64.
        logprobs: [sum(k)] float64, true log-probabilities.
        tail: [N] float64, probability of all other ids.
    """

    k: Ints
    ids: Ints
    logprobs: Floats
    tail: Floats

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.k)

    def part(self, start: int, stop: int) -> Kept:
        """Tokens ``start`` to ``stop``."""
        ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.k)])
        flat = slice(int(ends[start]), int(ends[stop]))
        return Kept(self.k[start:stop], self.ids[flat], self.logprobs[flat], self.tail[start:stop])


def join(parts: Sequence[Kept]) -> Kept:
    """Several, one after the other; of none, no token."""
    if not parts:
        none, nothing = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float64)
        return Kept(none, none, nothing, nothing)
    fields = ("k", "ids", "logprobs", "tail")
    return Kept(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def lowest_probability(bits: int) -> float:
    """Below this a probability has no level; such tokens belong to the tail."""
    return float((0.5 / _top(bits)) ** 3)


def encode_row(kept: Kept, code: IdCode, bits: int) -> bytes:
    """The row's bytes. ``bits``: of a level, 6 to 16; a probability below :func:`lowest_probability` becomes that.

    Raises:
        ConformanceError: A number is not finite, or the row is too large to be read again.
    """
    if not (np.isfinite(kept.logprobs).all() and np.isfinite(kept.tail).all()):
        raise ConformanceError("a probability to be kept is not finite")
    if len(kept.ids) > MOST_KEPT:
        raise ConformanceError(f"keeps {len(kept.ids):,} ids", allowed=f"{MOST_KEPT:,} in one row", hint="lower max_k")
    begins = segment_starts(kept.k)
    unary, low, back = code.encode(kept.ids, kept.k)
    levels = np.rint(np.cbrt(np.exp(kept.logprobs[back])) * _top(bits)).astype(np.int64)
    levels = np.maximum(levels, 1)
    least = np.minimum.reduceat(levels, begins)
    above = levels - np.repeat(least, kept.k)
    # The number of low bits that makes unary rest and low bits together the shortest.
    costs = np.stack([np.add.reduceat((above >> width) + width, begins) for width in range(bits)])
    rice = costs.argmin(axis=0).astype(np.int64)
    widths = np.repeat(rice, kept.k)
    rest = pack_unary(above >> widths)
    wide = int(kept.k.max() - 1).bit_length(), int(least.max()).bit_length()
    head = pack_widths(np.concatenate([kept.k - 1, _odds(kept), least, rice]), _head_widths(kept.tokens, *wide))
    fine = pack_widths(above & ((1 << widths) - 1), widths)
    data = b"".join((_HEAD.pack(*wide, len(unary), len(rest)), head, unary, rest, fine, low))
    if len(data) > MOST_BYTES:
        raise ConformanceError(f"takes {len(data):,} bytes", allowed=f"{MOST_BYTES:,} in one row", hint="lower max_k")
    return data


def decode_row(data: bytes, tokens: int, code: IdCode) -> Kept:
    """What :func:`encode_row` wrote for ``tokens`` tokens; the ids of a token come in the order of the code.

    Raises:
        DataError: The bytes are not such a row.
    """
    try:
        wide_k, wide_least, unary_size, rest_size = _HEAD.unpack_from(data)
    except struct.error as error:
        raise DataError("the row ends too early") from error
    body = np.frombuffer(data, dtype=np.uint8, offset=_HEAD.size)
    # Whatever is claimed, nothing is made that is larger than the bytes that are there allow.
    bits = tokens * (16 + _RICE + wide_k + wide_least)
    if max(wide_k, wide_least) > MAX_WIDTH or tokens < 1 or bits > 8 * len(body):
        raise DataError("the head of the row is impossible")
    heads = read_widths(body, _head_widths(tokens, wide_k, wide_least)).reshape(4, tokens)
    k, odds, least, rice = heads[0] + 1, heads[1], heads[2], heads[3]
    body = body[-(-bits // 8) :]
    # Every kept id has at least one bit in either unary part.
    most = min(8 * unary_size, 8 * rest_size, MOST_KEPT)
    if unary_size + rest_size > len(body) or int(k.max()) > len(code.counts) or int(k.sum()) > most:
        raise DataError("the row claims more ids than it can have")
    unary, rest, body = body[:unary_size], body[unary_size:][:rest_size], body[unary_size + rest_size :]
    fine = np.repeat(rice, k)
    above = (read_unary(rest, len(fine)) << fine) | read_widths(body, fine)
    ids = code.decode(unary, body[-(-int(fine.sum()) // 8) :], k)
    levels = above + np.repeat(least, k)
    if int(levels.min()) < 1:
        raise DataError("a level is zero")
    return _whole(k, ids, levels, odds)


def _whole(k: Ints, ids: Ints, levels: Ints, odds: Ints) -> Kept:
    """Log-probabilities that leave exactly the tail, from levels and the tail's log-odds (0: there is no tail)."""
    logit = np.where(odds == 0, -np.inf, (odds - _MIDDLE) / _ODDS)
    log_kept, tail = -np.logaddexp(0, logit), np.exp(-np.logaddexp(0, -logit))
    shares = 3 * np.log(levels)
    total = np.log(np.add.reduceat(levels.astype(np.float64) ** 3, segment_starts(k)))
    return Kept(k, ids, shares + np.repeat(log_kept - total, k), tail)


def _odds(kept: Kept) -> Ints:
    """Log-odds of the tail as 1 to 65535; 0 where there is none."""
    inside = np.add.reduceat(np.exp(kept.logprobs), segment_starts(kept.k))
    known = kept.tail > 0
    # The exponential of a log-probability below -745 is zero.
    logit = np.log(np.where(known, kept.tail, 1.0)) - np.log(np.maximum(inside, np.finfo(np.float64).tiny))
    return np.where(known, np.clip(np.rint(logit * _ODDS).astype(np.int64) + _MIDDLE, 1, 2 * _MIDDLE - 1), 0)


def _head_widths(tokens: int, wide_k: int, wide_least: int) -> Ints:
    return np.repeat(np.array([wide_k, 16, wide_least, _RICE], dtype=np.int64), tokens)


def _top(bits: int) -> int:
    return 2**bits - 1

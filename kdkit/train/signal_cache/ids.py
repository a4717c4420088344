"""The code of token ids: few bits for tokens that are often among a teacher's most probable ones.

Ids are put in an order by how often they were kept in a sample, and this order is cut into buckets, each as wide as a
power of two and expected to hold about one id of a token with k kept ids. A kept id is the number of buckets since the
one before it, in unary, and its place in the bucket. It is the Elias-Fano code of a sorted set (Elias 1974), with
buckets that follow the density. Reading needs no loop over ids.

All arithmetic is in integers: the same counts give the same code on every machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from kdkit.api.errors import DataError
from kdkit.train.signal_cache.bits import pack_unary, pack_widths, read_unary, read_widths, segment_starts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]

__all__ = ["IdCode"]

_SCALE: Final = 1024
_CLASSES: Final = 18
"""Bucket layouts: for k about 1, 2, 4, ... 131,072."""


@dataclass(frozen=True, eq=False)
class IdCode:
    """Codes sets of ids below ``len(counts)``.

    Attributes:
        counts: [V] how often each id was kept in the sample; all zeros make every id alike.
    """

    counts: Ints

    @cached_property
    def _weights(self) -> Ints:
        """Relative density: the count, smoothed by that of ids near it, which tokenizers number by frequency."""
        places = np.arange(len(self.counts), dtype=np.int64)
        bins = _bins(len(self.counts))
        sums = np.bincount(bins, weights=self.counts).astype(np.int64)
        near = sums * _SCALE // np.maximum(np.bincount(bins), 1)
        smoothed: Ints = 2 * _SCALE * self.counts + near[bins[places]] + 1
        return smoothed

    @cached_property
    def order(self) -> Ints:
        """[V] ids from the most frequent to the rarest."""
        return np.argsort(-self._weights, kind="stable")

    @cached_property
    def _rank(self) -> Ints:
        rank = np.empty_like(self.order)
        rank[self.order] = np.arange(len(self.order))
        return rank

    @cached_property
    def _layouts(self) -> tuple[Ints, Ints, Ints]:
        """Start and width (in bits) of the buckets of all layouts, and where each layout begins."""
        density = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self._weights[self.order])])
        parts = [_layout(density, 2**number) for number in range(_CLASSES)]
        first = segment_starts(np.array([len(starts) for starts, _ in parts], dtype=np.int64))
        starts, widths = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        return starts, widths, first

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of order and buckets: what a reader must arrive at."""
        text = b"".join(array.astype("<i8").tobytes() for array in (self.order, *self._layouts))
        return hashlib.sha256(text).hexdigest()

    def encode(self, ids: Ints, k: Ints) -> tuple[bytes, bytes, Ints]:
        """Bytes of ids that lie end to end, ``k[i]`` of them for token i, each set without repeats.

        Returns:
            Unary part, low bits, and the permutation [sum(k)] in which the ids come back.
        """
        starts, widths, first = self._layouts
        owner = np.repeat(np.arange(len(k)), k)
        rank = self._rank[ids]
        back = np.lexsort((rank, owner))
        rank, layout = rank[back], _layout_number(k)[owner]
        bucket = np.empty_like(rank)
        for number in np.unique(layout):
            mine, begin = layout == number, int(first[number])
            end = int(first[number + 1]) if number + 1 < len(first) else len(starts)
            bucket[mine] = np.searchsorted(starts[begin:end], rank[mine], side="right") - 1
        steps = np.diff(bucket, prepend=0)
        begins = segment_starts(k)
        steps[begins] = bucket[begins]
        place = first[layout] + bucket
        return pack_unary(steps), pack_widths(rank - starts[place], widths[place]), back

    def decode(self, unary: Bytes, low: Bytes, k: Ints) -> Ints:
        """The ids that :meth:`encode` wrote, in its order.

        Raises:
            DataError: The bytes are not such a code.
        """
        starts, widths, first = self._layouts
        steps = read_unary(unary, int(k.sum()))
        begins = segment_starts(k)
        running = np.cumsum(steps)
        bucket = running - np.repeat(running[begins] - steps[begins], k)
        layout = np.repeat(_layout_number(k), k)
        place = first[layout] + bucket
        if bool((place >= np.append(first[1:], len(starts))[layout]).any()):
            raise DataError("an id lies beyond the vocabulary")
        rank = starts[place] + read_widths(low, widths[place])
        if int(rank.max(initial=0)) >= len(self.order):
            raise DataError("an id lies beyond the vocabulary")
        rising = np.diff(rank) > 0
        rising[begins[1:] - 1] = True
        if not rising.all():
            raise DataError("the ids of a token are not in order")
        ids: Ints = self.order[rank]
        return ids


def _layout_number(k: Ints) -> Ints:
    """The power of two next to k, by ratio: 1 2 4 4 4 8 ... without floating point."""
    powers = 2 ** np.arange(1, _CLASSES, dtype=np.int64)
    # k is nearer to 2^n than to 2^(n-1) from sqrt(2) 2^(n-1) on, that is 2 k^2 >= 4^n.
    return np.searchsorted(powers * powers, 2 * k * k, side="right")


def _layout(density: Ints, kept: int) -> tuple[Ints, Ints]:
    """Buckets over the order, each the widest with at most one expected id out of ``kept``."""
    size, total = len(density) - 1, int(density[-1])
    starts, widths, start = [], [], 0
    while start < size:
        width = 0
        while 2**width < size - start:
            end = min(size, start + 2 ** (width + 1))
            if int(density[end] - density[start]) * kept > total:
                break
            width += 1
        starts.append(start)
        widths.append(width)
        start += 2**width
    return np.array(starts, dtype=np.int64), np.array(widths, dtype=np.int64)


def _bins(size: int) -> Ints:
    """Neighbourhoods of ids, each about a fifth wider than the one before."""
    edges, edge = [], 0
    while edge < size:
        edges.append(edge)
        edge += 16 + edge // 5
    return np.searchsorted(np.array(edges, dtype=np.int64), np.arange(size), side="right") - 1

"""Which of the rows of a source stay: one of each set of copies, and the first so many in hash order.

Memory: for every row about 200 bytes (its id and hashes of its text); whole examples only as far as they may still be
kept, in memory up to :data:`MEMORY` and beyond it in a temporary file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from kdkit.api.data import Example
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.spool import ExampleFile, StoredExamples, memory_of
from kdkit.plugins.datasets.values import RowError

__all__ = ["MEMORY", "Selection"]

MEMORY: Final = 192 * 2**20
"""Bytes of examples that are held in memory before they go to a temporary file."""
_PLACE_BYTES: Final = 7
_SPARE: Final = 1000


@dataclass
class Selection:
    """Takes rows in any order and gives the same examples for the same rows.

    A row's rank is its place in hash order, then its id. Of several copies the one of the lowest rank stays, so that
    what is kept depends neither on the order of the rows nor on how many rows are asked for.

    Attributes:
        options: Duplicates and ``max_rows``.
        content: What makes two examples copies of each other.
        counts: Receives ``duplicate``, ``other-split`` and ``over-max-rows``.
    """

    options: SplitOptions
    content: Callable[[Example], str]
    counts: Counter[str]
    _texts: dict[str, int] = field(default_factory=dict)
    _best: dict[bytes, bytes] = field(default_factory=dict)
    _entries: list[tuple[bytes, Example | int]] = field(default_factory=list)
    _beaten: set[bytes] = field(default_factory=set)
    _repeats: Counter[str] = field(default_factory=Counter)
    _chosen: int = 0
    _last: bytes | None = None
    _memory: int = 0
    _file: ExampleFile | None = None

    def identified(self, example: Example) -> Example | None:
        """``example`` with an id of its own; None when a row with its id and text was there before.

        Raises:
            RowError: Another row has the same id.
        """
        text = hash((example.prompt, example.completion, example.references))
        before = self._texts.get(example.id)
        if before is None:
            self._texts[example.id] = text
            return example
        if before != text:
            raise RowError(f"has the id {example.id!r} of an earlier row with another text")
        if self.options.dedup != "none":
            return None
        self._repeats[example.id] += 1
        return replace(example, id=f"{example.id}~{self._repeats[example.id] + 1}")

    def add(self, place: int, example: Example, *, chosen: bool) -> None:
        """Take a row into account; ``chosen`` says whether it is of the part that is asked for."""
        # The last byte decides nothing, since no two rows have both place and id in common.
        rank = place.to_bytes(_PLACE_BYTES, "big") + example.id.encode() + bytes([chosen])
        if self.options.dedup != "none" and not self._is_first(rank, example):
            return
        if not chosen:
            self.counts["other-split"] += 1
            return
        self._chosen += 1
        if self._last is None or rank <= self._last:
            self._keep(rank, example)

    def examples(self) -> Sequence[Example]:
        """What stays, in hash order."""
        self._cut(self.options.max_rows)
        over = self._chosen - len(self._entries)
        if over:
            self.counts["over-max-rows"] = over
        if self._file is None:
            return tuple(item for _, item in self._entries if isinstance(item, Example))
        return StoredExamples(self._file, (item for _, item in self._entries if isinstance(item, int)))

    def _is_first(self, rank: bytes, example: Example) -> bool:
        """Whether no copy of a lower rank is known; a copy of a higher rank is beaten by this row."""
        content = hashlib.blake2b(self.content(example).encode(), digest_size=12).digest()
        before = self._best.setdefault(content, rank)
        if before is rank:
            return True
        self.counts["duplicate"] += 1
        if before < rank:
            return False
        self._best[content] = rank
        if before[-1]:
            self._beaten.add(before)
            self._chosen -= 1
        else:
            self.counts["other-split"] -= 1
        return True

    def _keep(self, rank: bytes, example: Example) -> None:
        if self._file is None:
            self._memory += memory_of(example)
        self._entries.append((rank, example if self._file is None else self._file.write(example)))
        if self._spare is not None and len(self._entries) >= 2 * self._spare:
            self._cut(self._spare)
        if self._file is None and self._memory > MEMORY:
            self._spill()

    @property
    def _spare(self) -> int | None:
        """How many rows to hold on to: more than ``max_rows``, since a copy in another part may still beat some."""
        return None if self.options.max_rows is None else 2 * self.options.max_rows + _SPARE

    def _cut(self, count: int | None) -> None:
        """Leave the first ``count`` in hash order; later rows of a higher rank are then not held at all."""
        entries = sorted((entry for entry in self._entries if entry[0] not in self._beaten), key=_rank)
        self._beaten.clear()
        if count is not None and len(entries) > count:
            del entries[count:]
            self._last = entries[-1][0]
        if self._file is None:
            self._memory = sum(memory_of(item) for _, item in entries if isinstance(item, Example))
        self._entries = entries

    def _spill(self) -> None:
        file = self._file = ExampleFile()
        self._entries = [
            (rank, file.write(item) if isinstance(item, Example) else item) for rank, item in self._entries
        ]


def _rank(entry: tuple[bytes, Example | int]) -> bytes:
    return entry[0]

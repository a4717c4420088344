"""Which of the rows of a source stay: one of each set of copies, and the first so many in hash order.

Memory: for every row about 300 bytes (its id and hashes of its text); whole examples only as far as they may still be
kept, in memory up to :data:`MEMORY` and beyond it in a temporary file.
"""

from __future__ import annotations

import hashlib
import json
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
_FACTS_BYTES: Final = 8
_SPARE: Final = 1000
_PARTS: Final = ("train", "validation", "test")


@dataclass
class Selection:
    """Takes rows in any order and gives the same examples for the same rows.

    A row's rank is its place in hash order, then its id, then a hash of all that is neither id nor text. Of several
    copies the one of the lowest rank stays, so that what is kept depends neither on the order of the rows nor on how
    many rows are asked for.

    Attributes:
        options: Duplicates and ``max_rows``.
        content: What makes two examples copies of each other.
        counts: Receives ``duplicate``, ``other-split``, ``shared-with-other-split`` and ``over-max-rows``.
        hold_all: Hold every row that may be kept. Otherwise some may be missing at the end, where many copies in other
            parts beat rows that were held: :attr:`missing` says so, and :meth:`fetch` takes them in a second pass.
    """

    options: SplitOptions
    content: Callable[[Example], str]
    counts: Counter[str]
    hold_all: bool = True
    _texts: dict[str, int] = field(default_factory=dict)
    _made: set[str] = field(default_factory=set)
    _best: dict[bytes, bytes] = field(default_factory=dict)
    _shared: dict[bytes, tuple[bytes, ...]] = field(default_factory=dict)
    _entries: dict[bytes, Example | int] = field(default_factory=dict)
    _repeats: Counter[str] = field(default_factory=Counter)
    _chosen: int = 0
    _last: bytes | None = None
    _memory: int = 0
    _file: ExampleFile | None = None
    _kept: list[bytes] | None = None
    _wanted: set[bytes] = field(default_factory=set)

    def identified(self, example: Example) -> Example:
        """``example``; with ``dedup: none`` under an id of its own when a row with its id and text was there before.

        Raises:
            RowError: Another row has the same id.
        """
        text = hash((example.prompt, example.completion, example.references))
        before = self._texts.get(example.id)
        if before is None:
            self._texts[example.id] = text
            return example
        if before != text and example.id not in self._made:
            raise RowError(f"has the id {example.id!r} of an earlier row with another text")
        if self.options.dedup != "none":
            return example
        number = self._repeats[example.id] + 2
        # The source itself may have ids of this form.
        while (name := f"{example.id}~{number}") in self._texts:
            number += 1
        self._repeats[example.id] = number - 1
        self._texts[name] = text
        self._made.add(name)
        return replace(example, id=name)

    def add(self, place: int, example: Example, *, part: str, shared: Sequence[str] = ()) -> None:
        """Take a row into account.

        Args:
            place: Its place in hash order.
            example: The row.
            part: ``train``, ``validation`` or ``test``.
            shared: What no two parts may have in common: what is in ``test`` stays in no other part, and what is in
                ``validation`` not in ``train``. With ``dedup: none`` and with ``split: all`` it plays no part.
        """
        chosen = self.options.split in ("all", part)
        rank = _rank(place, example) + bytes([_PARTS.index(part), chosen])
        if self.options.dedup != "none" and not self._is_first(rank, example):
            return
        if shared and self.options.split != "all" and self.options.dedup != "none":
            self._shared[rank] = tuple(_hash(key) for key in shared)
        if not chosen:
            self.counts["other-split"] += 1
            return
        self._chosen += 1
        if self._last is None or rank <= self._last:
            self._keep(rank, example)

    @property
    def missing(self) -> bool:
        """Whether rows that stay are not held, so that :meth:`fetch` is needed for all rows once more."""
        return not self._entries.keys() >= set(self._ranks())

    def fetch(self, place: int, example: Example, *, part: str) -> None:
        """Hold the row if it stays; for a second pass over the rows."""
        rank = _rank(place, example) + bytes([_PARTS.index(part), True])
        if rank in self._wanted and rank not in self._entries:
            self._hold(rank, example)

    def examples(self) -> Sequence[Example]:
        """What stays, in hash order."""
        ranks = self._ranks()
        items = [self._entries[rank] for rank in ranks if rank in self._entries]
        if over := self._chosen - len(items):
            self.counts["over-max-rows"] = over
        if self._file is None:
            return tuple(item for item in items if isinstance(item, Example))
        return StoredExamples(self._file, (item for item in items if isinstance(item, int)))

    def _ranks(self) -> list[bytes]:
        """The ranks of the rows that stay, in hash order; called when all rows are in."""
        if self._kept is None:
            everything = self._entries if self.options.dedup == "none" else self._best.values()
            leaked = self._leaked()
            self.counts["shared-with-other-split"] += len(leaked)
            self._chosen -= len(leaked)
            ranks = sorted(rank for rank in everything if rank[-1] and rank not in leaked)
            self._kept = ranks[: self.options.max_rows]
            self._wanted = set(self._kept)
            self._best.clear()
            self._shared.clear()
            for rank in self._entries.keys() - self._wanted:
                del self._entries[rank]
        return self._kept

    def _leaked(self) -> set[bytes]:
        """The chosen rows that share something with a row of a part that comes before theirs."""
        highest: dict[bytes, int] = {}
        for rank, keys in self._shared.items():
            for key in keys:
                highest[key] = max(highest.get(key, 0), rank[-2])
        return {rank for rank, keys in self._shared.items() if rank[-1] and any(highest[k] > rank[-2] for k in keys)}

    def _is_first(self, rank: bytes, example: Example) -> bool:
        """Whether no copy of a lower rank is known; a copy of a higher rank is beaten by this row."""
        content = _hash(self.content(example))
        before = self._best.get(content)
        if before is None:
            self._best[content] = rank
            return True
        self.counts["duplicate"] += 1
        if before <= rank:
            return False
        self._best[content] = rank
        self._shared.pop(before, None)
        if not before[-1]:
            self.counts["other-split"] -= 1
            return True
        self._chosen -= 1
        beaten = self._entries.pop(before, None)
        if isinstance(beaten, Example):
            self._memory -= memory_of(beaten)
        return True

    def _keep(self, rank: bytes, example: Example) -> None:
        self._hold(rank, example)
        if self._spare is not None and len(self._entries) >= 2 * self._spare:
            self._cut(self._spare)

    def _hold(self, rank: bytes, example: Example) -> None:
        if self._file is None:
            self._memory += memory_of(example)
        self._entries[rank] = example if self._file is None else self._file.write(example)
        if self._file is None and self._memory > MEMORY:
            self._spill()

    @property
    def _spare(self) -> int | None:
        """How many rows to hold on to: more than ``max_rows``, since a copy in another part may still beat some."""
        count = self.options.max_rows
        if count is None or self.options.dedup == "none":
            return count
        return None if self.hold_all else 2 * count + _SPARE

    def _cut(self, count: int) -> None:
        """Leave the first ``count`` in hash order; later rows of a higher rank are then not held at all."""
        ranks = sorted(self._entries)
        self._last = ranks[count - 1]
        for rank in ranks[count:]:
            dropped = self._entries.pop(rank)
            if isinstance(dropped, Example):
                self._memory -= memory_of(dropped)

    def _spill(self) -> None:
        file = self._file = ExampleFile()
        self._entries = {
            rank: file.write(item) if isinstance(item, Example) else item for rank, item in self._entries.items()
        }


def _rank(place: int, example: Example) -> bytes:
    facts = json.dumps([example.category, example.echo, example.every_turn, example.extra], sort_keys=True)
    digest = hashlib.blake2b(facts.encode(), digest_size=_FACTS_BYTES).digest()
    # No id holds a NUL, so none is the start of another.
    return place.to_bytes(_PLACE_BYTES, "big") + example.id.encode() + b"\0" + digest


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()

"""A teacher's view of the same text in its own tokens, cut into blocks that hold whole groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kdkit.api.data import AlignedLossInputs, Dense, TokenBatch
from kdkit.api.errors import ConformanceError
from kdkit.models.chat import Encoded
from kdkit.train.alignment import NO_GROUP, AlignedRow
from kdkit.train.batching import collate
from kdkit.train.divergences import upcast

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import TeacherSignals

__all__ = ["AlignedSignals", "Span", "aligned_batch"]


@dataclass(frozen=True, slots=True)
class Span:
    """A block: tokens ``start`` to ``stop`` of the student, and the ``groups`` groups from ``first`` on inside it."""

    start: int
    stop: int
    first: int = 0
    groups: int = 0


@dataclass(frozen=True, slots=True)
class AlignedSignals:
    """The teacher's view of a batch in its own tokens. Groups are numbered through the batch.

    Attributes:
        signals: The teacher's view of its M learned tokens.
        labels: [M] int64 ids of those tokens.
        student_groups: Group of each of the student's N learned tokens, rising; ``NO_GROUP`` where it has none.
        teacher_groups: The same for the teacher's M tokens.
        ranges: For every group the first of the teacher's tokens in it, and the one after its last.
    """

    signals: TeacherSignals
    labels: Tensor
    student_groups: tuple[int, ...]
    teacher_groups: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.ranges)

    def spans(self, size: int) -> Iterator[Span]:
        """Blocks that cover the student's tokens in order, of at most ``size`` tokens on either side.

        A single group that is longer is a block of its own.
        """
        begin = Span(0, 0)
        for stop, done in self._ends():
            tokens = stop - begin.start
            theirs = self.ranges[done - 1][1] - self.ranges[begin.first][0] if done > begin.first else 0
            if begin.stop > begin.start and max(tokens, theirs) > size:
                yield begin
                begin = Span(begin.stop, begin.stop, begin.first + begin.groups)
            begin = replace(begin, stop=stop, groups=done - begin.first)
        if begin.stop > begin.start:
            yield begin

    def inputs(self, logits: Tensor, labels: Tensor, span: Span) -> AlignedLossInputs:
        """What an aligned loss sees of a block.

        Args:
            logits: [n, V] the student's logits of the block.
            labels: [n] the student's ids of the block.
            span: The block; it has a group.

        Raises:
            ConformanceError: The teacher gives no logits.
        """
        low, high = self.ranges[span.first][0], self.ranges[span.first + span.groups - 1][1]
        with torch.no_grad():
            signal = self.signals.block(low, high)
        if not isinstance(signal, Dense):
            raise ConformanceError("an aligned loss needs the teacher's logits", allowed="a teacher that gives logits")
        mine = _Members.of(self.student_groups[span.start : span.stop], span.first, logits.device)
        its = _Members.of(self.teacher_groups[low:high], span.first, logits.device)
        return AlignedLossInputs(
            student_logits=mine.of_rows(logits),
            teacher_logits=upcast(its.of_rows(signal.logits)),
            student_labels=mine.of_rows(labels),
            teacher_labels=its.of_rows(self.labels[low:high]),
            student_groups=mine.groups,
            teacher_groups=its.groups,
            groups=span.groups,
        )

    def _ends(self) -> Iterator[tuple[int, int]]:
        """Where a block may end: tokens of the student and groups that are finished there."""
        done = 0
        for place, group in enumerate(self.student_groups, 1):
            if group != NO_GROUP:
                done = group + 1
            if group == NO_GROUP or self.student_groups[place : place + 1] != (group,):
                yield place, done


@dataclass(frozen=True, slots=True)
class _Members:
    """Places of the tokens that are in a group, and the number of that group within the block."""

    places: Tensor
    groups: Tensor

    @classmethod
    def of(cls, groups: Sequence[int], first: int, device: torch.device) -> _Members:
        places = [place for place, group in enumerate(groups) if group != NO_GROUP]
        numbers = [groups[place] - first for place in places]
        return cls(*(torch.tensor(values, dtype=torch.int64, device=device) for values in (places, numbers)))

    def of_rows(self, rows: Tensor) -> Tensor:
        """The members' rows; no copy where all of them are members, which is the rule."""
        return rows if len(self.places) == len(rows) else rows[self.places]


def aligned_batch(
    rows: Sequence[AlignedRow],
    lay: Callable[[Sequence[Encoded]], TokenBatch],
    signals: Callable[[TokenBatch], TeacherSignals],
) -> tuple[TokenBatch, AlignedSignals]:
    """The student's batch, and the teacher's view of the same rows.

    Args:
        rows: Rows of a micro-batch.
        lay: Makes a batch of the student's rows, in an order of its choice.
        signals: The teacher's view of a batch of its own tokens. Its rows are padded, in the student's order.
    """
    # Ids may be equal in a mixture; the order is told by numbers.
    batch = lay([Encoded(str(place), row.ids, row.learned) for place, row in enumerate(rows)])
    ordered = [rows[int(place)] for place in batch.example_ids]
    batch = replace(batch, example_ids=tuple(row.id for row in ordered))
    theirs = collate([row.teacher for row in ordered], device=batch.input_ids.device)
    mine, its, done = [], [], 0
    for row in ordered:
        mine += [group if group == NO_GROUP else group + done for group in row.student_groups]
        its += [group if group == NO_GROUP else group + done for group in row.teacher_groups]
        done += row.groups
    ranges: dict[int, tuple[int, int]] = {}
    for place, group in enumerate(its):
        ranges[group] = ranges.get(group, (place, 0))[0], place + 1
    ranges.pop(NO_GROUP, None)
    labels = theirs.input_ids[:, 1:][theirs.labels_mask[:, 1:]]
    return batch, AlignedSignals(signals(theirs), labels, tuple(mine), tuple(its), tuple(ranges.values()))

"""Rows for a teacher with another tokenizer: which tokens of student and teacher cover the same text.

Each model reads the conversation in its own chat template and tokens. Tokens of the answer are put into the smallest
groups whose text is the same on both sides; the end of an answer, whatever each template marks it with, is one group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Literal

from kdkit.api.errors import ConformanceError, DataError
from kdkit.models.chat import Encoded
from kdkit.models.cuts import OUTSIDE

if TYPE_CHECKING:
    from kdkit.api import Example
    from kdkit.models.cuts import CutEncoder, CutRow

__all__ = ["LONGEST_GROUP", "NO_GROUP", "AlignedRow", "align", "aligned_rows", "encode_aligned", "group_count"]

NO_GROUP: Final = -1
LONGEST_GROUP: Final = 64
"""Tokens of one side. A group is computed at once, so that its length bounds memory; a text in which two tokenizers
find no common cut for longer has next to no probability to compare."""


@dataclass(frozen=True, slots=True)
class AlignedRow(Encoded):
    """A student's row, and the same example as the teacher reads it.

    Attributes:
        teacher: Token ids of the teacher; its learned tokens are those of the answers.
        student_groups: Group of every learned token of the student, from 0 and rising; ``NO_GROUP`` where it has none.
        teacher_groups: The same for every learned token of the teacher.
        groups: How many groups there are. Each has tokens on both sides.
    """

    teacher: Encoded
    student_groups: tuple[int, ...]
    teacher_groups: tuple[int, ...]
    groups: int


def group_count(rows: Iterable[Encoded]) -> int:
    """Groups of all rows; rows without a teacher's side have none."""
    return sum(row.groups for row in rows if isinstance(row, AlignedRow))


def aligned_rows(rows: Sequence[Encoded]) -> list[AlignedRow]:
    """The same rows, each with a teacher's side.

    Raises:
        ConformanceError: A row has none: it was not made by :func:`encode_aligned`.
    """
    found = [row for row in rows if isinstance(row, AlignedRow)]
    if len(found) < len(rows):
        bare = next(row for row in rows if not isinstance(row, AlignedRow))
        raise ConformanceError(
            "an aligned loss needs rows in the teacher's tokens, too", where=f"row {bare.id}", hint="use encode_aligned"
        )
    return found


def align(student: CutRow, teacher: CutRow) -> AlignedRow:
    """Smallest groups of consecutive tokens that cover the same text, in order.

    Without truncation every token of an answer's text is in a group, unless its group has more than ``LONGEST_GROUP``
    tokens on a side. Tokens after the last common cut of a truncated row are in none.
    """
    shared = sorted(cut for cut in {*student.cuts} & {*teacher.cuts} if cut > 0)
    sides = [_members(side.cuts, shared) for side in (student, teacher)]
    sizes = [Counter(side) for side in sides]
    kept = [group for group in range(len(shared)) if max(size[group] for size in sizes) <= LONGEST_GROUP]
    numbers = {group: number for number, group in enumerate(kept)}
    own, its = (tuple(numbers.get(group, NO_GROUP) for group in side) for side in sides)
    row = student.row
    return AlignedRow(row.id, row.ids, row.learned, teacher.row, own, its, len(kept))


def _members(cuts: Sequence[int], shared: Sequence[int]) -> list[int]:
    """The place in ``shared`` of the first common cut at or after every token; ``len(shared)`` after the last."""
    places = {cut: index for index, cut in enumerate(shared)}
    members, group = [], 0
    for cut in cuts:
        members.append(NO_GROUP if cut == OUTSIDE else group)
        group = places.get(cut, group - 1) + 1
    return members


@dataclass(frozen=True, slots=True)
class _Side:
    """How one model reads examples: ``positions`` is how many tokens it can, where it says so."""

    whose: str
    encoder: CutEncoder
    max_length: int
    positions: int | None

    @property
    def limit(self) -> int:
        """The most tokens of a row."""
        return self.max_length if self.positions is None else min(self.max_length, self.positions)

    def bound(self) -> str:
        """What bounds a row, in words."""
        if self.limit < self.max_length:
            return f"the {self.whose}'s {self.limit} positions"
        return f"max_length={self.max_length} in the {self.whose}'s tokens"


@dataclass(slots=True)
class _Tally:
    """What becomes of the examples: why rows are dropped, what cuts others short, and answer tokens in no group."""

    dropped: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    alone: int = 0

    def lines(self, kept: int, rows: int) -> Iterator[str]:
        """What a user has to know."""
        if self.dropped:
            yield f"{kept} of {rows} rows kept; dropped {_counted(self.dropped)}"
        if self.shortened:
            yield f"cut short: {_counted(self.shortened)}"
        if self.alone:
            yield f"{self.alone} of {self.tokens} answer tokens are in no group: no aligned loss sees them"


def encode_aligned(
    examples: Sequence[Example],
    student: CutEncoder,
    teacher: CutEncoder,
    *,
    max_length: int,
    overlong: Literal["drop", "truncate"],
    log: Callable[[str], None],
    name: str,
    positions: tuple[int | None, int | None] = (None, None),
) -> list[AlignedRow]:
    """Training rows in which neither side has more than ``max_length`` tokens, or more than it has ``positions``.

    Each has at least one group with text: the end of an answer alone says too little about it.

    Raises:
        DataError: No row is left.
        ModelError: A chat template does not say where an answer starts.
    """
    sides = (_Side("student", student, max_length, positions[0]), _Side("teacher", teacher, max_length, positions[1]))
    tally = _Tally()
    rows = [_encode(example, sides, overlong, tally) for example in examples]
    kept = [row for row in rows if row is not None]
    if not kept:
        reasons = _counted(tally.dropped) or "the dataset is empty"
        raise DataError(f"no row is left of {len(examples)}: {reasons}", where=name)
    for line in tally.lines(len(kept), len(rows)):
        log(f"{name}: {line}")
    return kept


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def _encode(
    example: Example, sides: tuple[_Side, _Side], overlong: Literal["drop", "truncate"], tally: _Tally
) -> AlignedRow | None:
    if not example.completion:
        tally.dropped["without an answer"] += 1
        return None
    found: list[CutRow] = []
    longer = []
    for side in sides:
        row = side.encoder.cut_row(example)
        if row is None:
            tally.dropped[f"whose answer the {side.whose}'s chat template changes"] += 1
            return None
        longer += [side.bound()] if len(row.row.ids) > side.limit else []
        found.append(row.cut(side.limit))
    if longer and overlong == "drop":
        tally.dropped[f"longer than {' and '.join(longer)}"] += 1
        return None
    aligned = align(*found)
    if not _has_text(aligned, found[0].cuts, _ends(example)):
        bound = f"within {' and '.join(longer)}" if longer else f"in groups of at most {LONGEST_GROUP} tokens"
        tally.dropped[f"with no common text {bound}"] += 1
        return None
    tally.shortened.update(f"at {bound}" for bound in longer)
    own = [group for group, cut in zip(aligned.student_groups, found[0].cuts, strict=True) if cut != OUTSIDE]
    tally.tokens, tally.alone = tally.tokens + len(own), tally.alone + own.count(NO_GROUP)
    return aligned


def _ends(example: Example) -> set[int]:
    """The cuts that follow the ends of the answers that are learned."""
    turns = () if isinstance(example.prompt, str) or not example.every_turn else example.prompt
    answers = [*(turn.content for turn in turns if turn.role == "assistant"), example.completion or ""]
    return set(accumulate(len(answer) + 1 for answer in answers))


def _has_text(row: AlignedRow, cuts: Sequence[int], ends: Container[int]) -> bool:
    """Whether a group has more in it than the end of an answer; ``cuts`` are those of the student's tokens."""
    start = reached = 0
    current: int | None = None
    for group, cut in zip(row.student_groups, cuts, strict=True):
        if group != current:
            start, current = reached, group
        if cut < 0:
            continue
        reached = cut
        if group != NO_GROUP and not (cut in ends and cut == start + 1):
            return True
    return False

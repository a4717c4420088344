"""Rows for a teacher with another tokenizer: which tokens of student and teacher cover the same text.

Each model reads the conversation in its own chat template and tokens. Tokens of the answer are put into the smallest
groups whose text is the same on both sides; the end of an answer, whatever each template marks it with, is one group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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


def encode_aligned(
    examples: Sequence[Example],
    student: CutEncoder,
    teacher: CutEncoder,
    *,
    max_length: int,
    overlong: Literal["drop", "truncate"],
    log: Callable[[str], None],
    name: str,
) -> list[AlignedRow]:
    """Training rows in which neither side has more than ``max_length`` tokens, with at least one group.

    Raises:
        DataError: No row is left.
        ModelError: A chat template does not say where an answer starts.
    """
    kept: list[AlignedRow] = []
    dropped: Counter[str] = Counter()
    for example in examples:
        row = _encode(example, student, teacher, max_length, overlong)
        if isinstance(row, str):
            dropped[row] += 1
        else:
            kept.append(row)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not kept:
        raise DataError(f"no row is left of {len(examples)}: {reasons or 'the dataset is empty'}", where=name)
    if dropped:
        log(f"{name}: {len(kept)} of {len(examples)} rows kept; dropped {reasons}")
    return kept


def _encode(
    example: Example, student: CutEncoder, teacher: CutEncoder, max_length: int, overlong: Literal["drop", "truncate"]
) -> AlignedRow | str:
    """The row, or why there is none."""
    if not example.completion:
        return "without an answer"
    sides: list[CutRow] = []
    for whose, encoder in (("student", student), ("teacher", teacher)):
        side = encoder.cut_row(example)
        if side is None:
            return f"whose answer the {whose}'s chat template changes"
        if len(side.row.ids) > max_length:
            if overlong == "drop":
                return f"longer than max_length={max_length} in the {whose}'s tokens"
            side = side.cut(max_length)
        sides.append(side)
    row = align(*sides)
    return row if row.groups else f"with no common text within max_length={max_length}"

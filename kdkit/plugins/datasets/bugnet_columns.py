"""Which of BugNet's two program columns holds the buggy program, told without running any code.

In the second revision of BugNet the columns ``pass`` and ``fail`` are swapped: its generator names them in one order
and fills them in the other. In both revisions ``i1..i2`` are the changed lines of the buggy program and ``j1..j2``
those of the accepted one, and all lines before and after them are equal. Where the two ranges differ in length, this
holds for one reading of the columns only; where they are of one length it holds for both, and the row says nothing.

Measured on the real rows at hand: of 141 rows named rightly 81 decide and 60 say nothing, of 100 swapped rows 49 decide
and 51 say nothing; no row is wrong. The ranges of those rows were computed anew with the generator's rule, not copied.
The errors decide less: four of 141 name an identifier, and two of these are in one program more often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, TypeAlias

from kdkit.api.errors import DataError
from kdkit.plugins.datasets.values import SourceRow

__all__ = ["Reading", "file_of", "file_readings", "row_reading"]

Reading: TypeAlias = Literal["as-named", "swapped"]
TOLERATED: Final = 0.05
"""Share of the deciding rows of a file that may contradict the others."""


def row_reading(columns: Mapping[str, Any]) -> Reading | None:
    """What the line ranges of a row say; None when they fit both readings, neither, or are not there."""
    fail, accepted = columns.get("fail"), columns.get("pass")
    ranges = tuple(_line_number(columns.get(name)) for name in ("i1", "i2", "j1", "j2"))
    if not isinstance(fail, str) or not isinstance(accepted, str):
        return None
    # splitlines, as in the generator, so that form feeds and the like count the same.
    first, second = fail.splitlines(), accepted.splitlines()
    named, swapped = _fits(first, second, ranges), _fits(second, first, ranges)
    if named == swapped:
        return None
    return "as-named" if named else "swapped"


def file_of(row: SourceRow) -> str:
    """The file that a row came from."""
    return row.where.rpartition(":")[0]


def file_readings(rows: Iterable[SourceRow]) -> dict[str, Reading | None]:
    """The reading of each file that ``rows`` come from; None where no row decides.

    Raises:
        DataError: More than one in twenty deciding rows of a file contradict the others.
    """
    votes: dict[str, Counter[Reading]] = {}
    for row in rows:
        counted = votes.setdefault(file_of(row), Counter())
        if not row.problem and (reading := row_reading(row.columns)):
            counted[reading] += 1
    return {file: _decided(file, counted) for file, counted in votes.items()}


def _decided(file: str, votes: Counter[Reading]) -> Reading | None:
    if not votes:
        return None
    reading, most = votes.most_common(1)[0]
    if votes.total() - most > TOLERATED * votes.total():
        raise DataError(
            f"rows disagree on which column holds the buggy program: by their line ranges {votes['as-named']} are as "
            f"named and {votes['swapped']} swapped",
            where=file,
            hint="divide the file, or set columns: as-named or swapped",
        )
    return reading


def _line_number(value: Any) -> int:
    """-1 for what is no line number; tables with nulls hold whole numbers as floats."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        return -1
    return int(value)


def _fits(buggy: list[str], accepted: list[str], ranges: tuple[int, ...]) -> bool:
    i1, i2, j1, j2 = ranges
    if not (0 <= i1 <= i2 <= len(buggy) and 0 <= j1 <= j2 <= len(accepted)):
        return False
    return buggy[:i1] == accepted[:j1] and buggy[i2:] == accepted[j2:]

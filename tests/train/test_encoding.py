from __future__ import annotations

import pytest

from kdkit.api import DataError, Example
from kdkit.models.chat import ChatEncoder
from kdkit.testing.tiny import tiny_tokenizer
from kdkit.train.encoding import encode_rows, row_limit

ROWS = [
    Example(id="short", prompt="2?", completion="2."),
    Example(id="long", prompt="2?", completion="It is two, and two it is."),
]


def encoded(rows=ROWS, *, positions=(None, None), overlong="drop", max_length=100):
    logs = []
    options = {"max_length": max_length, "overlong": overlong, "positions": positions}
    return encode_rows(rows, ChatEncoder(tiny_tokenizer()), log=logs.append, name="d", **options), logs


@pytest.mark.parametrize(("positions", "expected"), [
    ((None, None), (100, "max_length=100")),
    ((100, 200), (100, "max_length=100")),
    ((64, None), (64, "the student's 64 positions")),
    ((64, 32), (32, "the teacher's 32 positions")),
])  # fmt: skip
def test_the_least_of_all_bounds_counts(positions, expected):
    assert row_limit(100, positions) == expected


@pytest.mark.parametrize(("side", "whose"), [(0, "student"), (1, "teacher")])
def test_rows_stay_within_the_positions_of_both_models(side, whose):
    (short, long), logs = encoded()
    assert logs == []
    few = [None, None]
    few[side] = len(long.ids) - 1
    rows, logs = encoded(positions=tuple(few))
    assert rows == [short]
    assert logs == [f"d: 1 of 2 rows kept; dropped 1 longer than the {whose}'s {few[side]} positions"]
    rows, _ = encoded(positions=tuple(few), overlong="truncate")
    assert [len(row.ids) for row in rows] == [len(short.ids), few[side]]
    few[side] = 2
    with pytest.raises(DataError, match=f"2 with a prompt over the {whose}'s 2 positions"):
        encoded(positions=tuple(few), overlong="truncate")

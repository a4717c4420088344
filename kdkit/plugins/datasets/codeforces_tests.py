"""The tests of a competitive programming problem, and whether programs can be judged by them.

Tests come in two shapes, a list of ``{input, output}`` and one object of two lists ``{input: [...], output: [...]}``,
under several names: ``official_tests`` (open-r1/codeforces), ``private_tests``, ``public_tests`` and
``generated_tests`` (codeforces-cots), where the last can also be a number, with the tests in files of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kdkit.api.errors import DataError, EnvironmentUnmet
from kdkit.models.examples import json_kind
from kdkit.plugins.datasets.readers import parquet_objects
from kdkit.plugins.datasets.values import RowError, clean_row, optional_text

__all__ = ["ProblemTests", "Test", "generated_tests", "problem_tests", "read_tests", "unjudgeable"]

Test = dict[str, str]
_COLUMNS: Final = ("official_tests", "private_tests", "public_tests", "public_tests_ms", "generated_tests")
_FILE_COLUMNS: Final = ["problem_id", "input", "output"]
_INTERACTIVE: Final = frozenset({"interactive", "interactor"})


@dataclass(frozen=True, slots=True)
class ProblemTests:
    """Tests of one problem.

    Attributes:
        tests: Without repetitions, in the order of the columns; they fit the room that there is.
        all_known: The source has all tests of the judge, or some that stand in for them.
        elsewhere: Generated tests exist that are not in the row.
        left_out: How many did not fit.
    """

    tests: tuple[Test, ...]
    all_known: bool
    elsewhere: bool
    left_out: int

    @property
    def complete(self) -> bool:
        return self.all_known and not self.left_out


def unjudgeable(columns: Mapping[str, Any]) -> str:
    """Why no comparison of outputs can judge programs for this problem, or nothing."""
    kind = optional_text(columns, "problem_type").strip().lower()
    if kind in _INTERACTIVE or optional_text(columns, "interaction_format").strip():
        return "interactive"
    if _flag(columns, "executable") is False:
        return "not-executable"
    if kind == "checker" and not optional_text(columns, "generated_checker").strip():
        return "no-checker"
    return ""


def problem_tests(columns: Mapping[str, Any], generated: Iterator[Test], room: int) -> ProblemTests:
    """The tests of a row, and those of ``generated`` after them, as long as they fit ``room`` bytes.

    Raises:
        RowError: A column of tests has another shape.
    """
    count = columns.get("generated_tests")
    number = count if isinstance(count, int | float) and not isinstance(count, bool) else None
    named = {name: read_tests(columns, name) for name in (_COLUMNS if number is None else _COLUMNS[:-1])}
    tests: dict[tuple[str, str], Test] = {}
    used = left_out = seen = generated_kept = 0
    for origin in (*(iter(group) for group in named.values()), generated):
        for test in origin:
            seen += origin is generated
            size = len(test["input"].encode()) + len(test["output"].encode())
            fits = (test["input"], test["output"]) in tests or used + size <= room
            generated_kept += fits and origin is generated
            left_out += not fits
            if not fits or (test["input"], test["output"]) in tests:
                continue
            tests[test["input"], test["output"]] = test
            used += size
    return ProblemTests(
        tests=tuple(tests.values()),
        all_known=bool(generated_kept) or _all_known(columns, named),
        elsewhere=bool(number and number > 0 and not seen),
        left_out=left_out,
    )


def _all_known(columns: Mapping[str, Any], named: Mapping[str, list[Test]]) -> bool:
    """Whether the row says that its official tests are all; rows that say nothing need more than public ones."""
    said = _flag(columns, "official_tests_complete")
    if said is not None:
        return said
    return any(named.get(name) for name in ("official_tests", "private_tests", "generated_tests"))


def read_tests(columns: Mapping[str, Any], name: str) -> list[Test]:
    """The tests in column ``name``, in either shape; none when it is missing or null."""
    value = columns.get(name)
    if value is None:
        return []
    if isinstance(value, dict):
        value = _transposed(value, name)
    if not isinstance(value, list):
        raise RowError(f"{name!r} is {json_kind(value)}, neither a list of tests nor an object of two lists")
    for test in value:
        if not isinstance(test, dict) or not all(isinstance(test.get(part), str) for part in ("input", "output")):
            raise RowError(f"{name!r} holds a test without the texts 'input' and 'output'")
    return [{"input": test["input"], "output": test["output"]} for test in value]


def _transposed(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    inputs, outputs = value.get("input"), value.get("output")
    if inputs is None and outputs is None:
        return []
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise RowError(f"{name!r} has not as many inputs as outputs")
    return [{"input": given, "output": expected} for given, expected in zip(inputs, outputs, strict=True)]


def _flag(columns: Mapping[str, Any], name: str) -> bool | None:
    value = columns.get(name)
    if value is not None and not isinstance(value, bool):
        raise RowError(f"{name!r} is {json_kind(value)}, neither true nor false")
    return value


def generated_tests(directory: Path | None, problem: str) -> Iterator[Test]:
    """The tests of ``problem`` (``1234/A``) in open-r1's files; none when there is no file for its contest.

    Raises:
        DataError: The directory is missing, or a file in it is damaged or has other columns.
        EnvironmentUnmet: A file cannot be read.
        RowError: A test holds what no file of ours can keep (half of a surrogate pair, NUL).
    """
    contest = re.fullmatch(r"(\d{1,7})/\w{1,8}", problem, re.ASCII)
    if directory is None or contest is None:
        return
    if not directory.is_dir():
        raise DataError("no such directory of generated tests", where=str(directory))
    file = directory / f"test_cases_{int(contest[1]):04d}.parquet"
    if file.is_file():
        yield from _parquet_tests(file, problem)


def _parquet_tests(file: Path, problem: str) -> Iterator[Test]:
    try:
        for row in parquet_objects(file, columns=_FILE_COLUMNS):
            if isinstance(row, RowError):
                raise DataError(f"is damaged: a row {row}", where=str(file), hint="fetch it again")
            if row["problem_id"] == problem:
                yield from read_tests({"tests": [clean_row(row, table=True)]}, "tests")
    except OSError as error:
        raise EnvironmentUnmet(f"cannot be read: {error}", where=str(file)) from error

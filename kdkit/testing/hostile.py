"""A bank of completions that try to earn a reward without an answer, and the honest wrong ones to compare them with.

The bank is data (``data/completions.jsonl``). In its texts ``{{prompt}}`` stands for the prompt, ``{{output}}`` for the
expected output of the first test and ``{{outputs}}`` for those of all tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from kdkit.api.data import Example
from kdkit.models.asserts import split_assert

__all__ = ["HostileCompletion", "expected_outputs", "honest_wrong", "hostile_completions"]

_FILE: Final = Path(__file__).parent / "data" / "completions.jsonl"
_HONEST: Final = "honest-wrong"
_HOLE: Final = re.compile(r"\{\{(prompt|outputs|output)\}\}")
_TESTS: Final = ("official_tests", "tests", "test_list", "examples")


@dataclass(frozen=True, slots=True)
class HostileCompletion:
    """A completion of the bank: its name, what it tries, and its text."""

    name: str
    why: str
    text: str


def hostile_completions(example: Example, prompt: str) -> list[HostileCompletion]:
    """The bank for an example: completions for any task, and for problems with tests programs in their language."""
    language = _language(example)
    chosen = [row for row in _bank() if row["name"] != _HONEST and row.get("language") in (None, language)]
    return [_filled(row, example, prompt) for row in chosen]


def honest_wrong(example: Example) -> HostileCompletion:
    """An answer in the right form, from someone who tried, which is wrong."""
    language = _language(example)
    row = next(row for row in _bank() if row["name"] == _HONEST and row.get("language", "") == language)
    return _filled(row, example, "")


def expected_outputs(example: Example) -> list[str]:
    """What the tests of an example expect, in order; none for an example without tests."""
    tests = next((found for name in _TESTS if isinstance(found := example.extra.get(name), list) and found), ())
    return [output for test in tests if (output := _expected(test)) is not None]


def _expected(test: Any) -> str | None:
    """What a test expects as text: an output, or the value of an assertion as it is printed."""
    if isinstance(test, Mapping):
        return str(test["output"]) if "output" in test else None
    found = split_assert(test) if isinstance(test, str) else ""
    return None if isinstance(found, str) else str(found.expected)


def _language(example: Example) -> str:
    """``python`` or ``cpp`` for problems with tests, else nothing."""
    if not expected_outputs(example):
        return ""
    named = str(example.extra.get("language") or "python").casefold()
    return "cpp" if named.startswith(("c++", "cpp")) else "python"


@cache
def _bank() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines())


def _filled(row: Mapping[str, Any], example: Example, prompt: str) -> HostileCompletion:
    outputs = expected_outputs(example)
    values = {"prompt": prompt, "output": outputs[0].strip() if outputs else "", "outputs": "\n".join(outputs)}
    text = "".join(part * times for part, times in row["parts"])
    return HostileCompletion(row["name"], row["why"], _HOLE.sub(lambda hole: values[hole[1]], text))

"""What a program is judged by: the tests of an example, its limits and its checker."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from kdkit.api.data import Example
from kdkit.api.sandboxes import SandboxLimits
from kdkit.models.asserts import setup_code, split_assert
from kdkit.plugins.rewards.calls import LONGEST_ANSWER, FunctionTest
from kdkit.plugins.rewards.programs import Language, language_of

__all__ = ["Limiting", "OutputTest", "Problem", "Test", "problem_of"]

Choice: TypeAlias = Literal["auto", "official", "examples"]
_COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "auto": ("official_tests", "tests", "test_list", "examples"),
    "official": ("official_tests", "tests", "test_list"),
    "examples": ("examples",),
}
_MALFORMED: Final = "its tests are no list of texts 'input' and 'output', nor of assertions"
_MIB: Final = 2**20
_SMALLEST_MB: Final = 64.0
_OUTPUT_ROOM: Final = 64 * 1024
_MOST_OUTPUT: Final = 16 * _MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Limiting:
    """How limits of a problem become limits of the sandbox; see the fields of the same names in the parameters."""

    time_limit: float
    time_factor: float | None
    max_time: float
    memory_mb: float
    max_memory_mb: float

    def limits(self, extra: Mapping[str, Any], language: Language, longest_output: int) -> SandboxLimits:
        """Limits for programs in ``language``; few distinct ones, since a sandbox stays warm for each."""
        factor = self.time_factor if self.time_factor is not None else {"python": 3.0, "cpp": 1.0}[language]
        cpu = min(_positive(extra, "time_limit", self.time_limit) * factor, self.max_time)
        memory = min(max(_positive(extra, "memory_limit", self.memory_mb), _SMALLEST_MB), self.max_memory_mb)
        room = 1 << (4 * longest_output + _OUTPUT_ROOM - 1).bit_length()
        return SandboxLimits(
            wall_s=2 * cpu + 1,
            cpu_s=cpu,
            memory_bytes=int(memory * _MIB),
            output_bytes=min(room, _MOST_OUTPUT),
        )


@dataclass(frozen=True, slots=True)
class OutputTest:
    """An input, and the output that is expected for it."""

    given: str
    expected: str


Test: TypeAlias = OutputTest | FunctionTest


@dataclass(frozen=True, slots=True)
class Problem:
    """Tests with limits.

    Attributes:
        tests: All of one kind: outputs to write, or functions to call.
        checker: A Python program that judges outputs, or None where they are compared.
        language: What the program is to be written in.
        limits: For each test.
        digest: Changes with any of the above.
    """

    tests: tuple[Test, ...]
    checker: str | None
    language: Language
    limits: SandboxLimits
    digest: str


def problem_of(
    example: Example | None, *, choice: Choice, language: Language | None, limiting: Limiting, max_tests: int | None
) -> Problem | str:
    """The problem of an example, or why there is none.

    Tests are lists in the example's extra columns: ``official_tests``, ``tests`` or ``test_list``, and ``examples``.
    They hold objects ``{input, output}``, or assertions about functions as in MBPP, which ``test_imports`` (a list) and
    ``test_setup_code`` prepare. ``language``, ``time_limit`` (seconds), ``memory_limit`` (megabytes), ``checker`` and
    ``input_mode`` stand beside them, all optional.
    """
    if example is None:
        return "no example"
    extra = example.extra
    if extra.get("input_mode") not in (None, "", "stdio"):
        return "its programs read and write files"
    wanted = language or language_of(str(extra.get("language") or "python"))
    if wanted is None:
        return f"no programs in {str(extra['language'])[:40]!r} can be run"
    given = next((found for name in _COLUMNS[choice] if (found := extra.get(name))), ())
    tests = _tests(given, extra)
    if isinstance(tests, str):
        return tests
    if not tests:
        return "no tests"
    if wanted != "python" and isinstance(tests[0], FunctionTest):
        return f"its tests call functions of Python, and the language is {wanted}"
    tests = tests[:max_tests]
    checker = extra.get("checker")
    checker = checker if isinstance(checker, str) and checker.strip() else None
    limits = limiting.limits(extra, wanted, max(map(_longest, tests)))
    return Problem(tests, checker, wanted, limits, _digest(tests, checker, wanted, limits))


def _tests(value: Any, extra: Mapping[str, Any]) -> tuple[Test, ...] | str:
    """The tests; why they cannot be used when one of them is something else, since fewer tests pass more."""
    if isinstance(value, list | tuple) and value and all(isinstance(test, str) for test in value):
        return _function_tests(value, extra)
    if not isinstance(value, list | tuple) or not all(isinstance(test, Mapping) for test in value):
        return _MALFORMED
    pairs = tuple((test.get("input"), test.get("output")) for test in value)
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        return _MALFORMED
    return tuple(OutputTest(given, expected) for given, expected in pairs)


def _function_tests(sources: Sequence[str], extra: Mapping[str, Any]) -> tuple[FunctionTest, ...] | str:
    setup = setup_code(extra)
    if setup is None:
        return "its test_setup_code or test_imports is no Python"
    found = [split_assert(source) for source in sources]
    for number, test in enumerate(found, 1):
        if isinstance(test, str):
            return f"test {number} cannot be judged: {test}"
    return tuple(FunctionTest(test, setup) for test in found if not isinstance(test, str))


def _longest(test: Test) -> int:
    return LONGEST_ANSWER if isinstance(test, FunctionTest) else len(test.expected.encode("utf-8", "replace"))


def _positive(extra: Mapping[str, Any], name: str, otherwise: float) -> float:
    value = extra.get(name)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return float(value) if usable and value is not None else otherwise


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()

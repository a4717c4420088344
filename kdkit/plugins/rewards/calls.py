"""Tests that call a function: the job that is sent to the sandbox, and what its answer is worth.

The program and its caller share an interpreter, so that nothing of the answer is believed but the value that it names:
it is read as data, by the rules of JSON, and compared here with the value that never left the judge. An object that
calls itself equal to everything has no name there, and is wrong.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from numbers import Number
from pathlib import Path
from typing import Any, Final

from kdkit.api.sandboxes import SandboxJob
from kdkit.models.asserts import CallTest
from kdkit.plugins.rewards import caller
from kdkit.plugins.rewards.verdicts import Verdict

__all__ = ["LONGEST_ANSWER", "FunctionTest", "same_value"]

LONGEST_ANSWER: Final = 65_536
"""Characters for which limits leave room; long enough for any value that a test may expect."""
_EXACT_FLOATS: Final = 2.0**53
_ROOM: Final = 4000
_PER_CHARACTER: Final = 50


@cache
def _caller() -> str:
    return Path(caller.__file__).read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class FunctionTest:
    """One assertion about a program's function.

    Attributes:
        test: The assertion, taken apart.
        setup: Python that runs after the program and before the call: imports and objects of the tests.
    """

    test: CallTest
    setup: str

    def job(self, program: str) -> SandboxJob:
        """The job: the caller, and as its input a word of its own, the program and the expression."""
        order = {
            "program": program,
            "setup": self.setup,
            "expression": f"_kdkit_result = ({self.test.expression})",
            "truth": self.test.rule == "truth",
        }
        return SandboxJob(program=_caller(), stdin=f"{secrets.token_hex(16)}\n{json.dumps(order)}")

    def verdict(self, job: SandboxJob, output: str, *, tolerance: float) -> Verdict:
        """What the output of ``job`` is worth; it ended well as far as the sandbox can tell.

        AC and WA; CE for what is no Python; RE for a program that ended before its function had returned.
        """
        word = job.stdin.partition("\n")[0]
        said, _, record = output.removesuffix("\n").rpartition("\n")[2].partition(" ")
        kind, _, text = record.partition(" ")
        if said != word or kind not in ("value", "other", "no-compile"):
            return Verdict.RE
        if kind == "no-compile":
            return Verdict.CE
        # What is much longer than the expected value is not it, and need not be read.
        if kind == "other" or len(text) > _ROOM + _PER_CHARACTER * self.test.length:
            return Verdict.WA
        try:
            given = _read(json.loads(text))
        except (ValueError, TypeError, ArithmeticError, RecursionError):
            return Verdict.WA
        return Verdict.AC if _passes(self.test, given, tolerance) else Verdict.WA


def _passes(test: CallTest, given: Any, tolerance: float) -> bool:
    expected = test.expected
    if test.rule in ("same", "truth"):
        return given is expected
    if test.rule == "equal":
        return same_value(expected, given, tolerance)
    if isinstance(given, complex) or not isinstance(given, Number):
        return False
    try:
        return math.isclose(given, expected, rel_tol=test.rel_tol, abs_tol=test.abs_tol)  # type: ignore[arg-type]
    except OverflowError:
        return False


def same_value(expected: Any, given: Any, tolerance: float) -> bool:
    """Whether Python's ``==`` holds, with a distance of ``tolerance`` for numbers with a point.

    So 1, 1.0 and True are the same, a list and a tuple are not. Two whole numbers are never close; to an expected float
    the other may have an absolute or relative distance of ``tolerance``, to an expected whole number an absolute one.
    Members of sets and keys of dictionaries are compared exactly.
    """
    if isinstance(expected, Number) and isinstance(given, Number):
        return expected == given or _close(expected, given, tolerance)
    if isinstance(expected, dict) and isinstance(given, dict):
        return expected.keys() == given.keys() and all(
            same_value(value, given[key], tolerance) for key, value in expected.items()
        )
    if isinstance(expected, list | tuple):
        return (
            type(expected) is type(given)
            and len(expected) == len(given)
            and all(same_value(a, b, tolerance) for a, b in zip(expected, given, strict=True))
        )
    if isinstance(expected, set | frozenset):
        return isinstance(given, set | frozenset) and expected == given
    return type(expected) is type(given) and bool(expected == given)


def _close(expected: Any, given: Any, tolerance: float) -> bool:
    whole = isinstance(expected, int)
    if not tolerance or isinstance(expected, bool) or (whole and isinstance(given, int)):
        return False
    try:
        size, distance = abs(complex(expected)), abs(complex(given) - complex(expected))
    except OverflowError:
        return False
    if not math.isfinite(size + distance) or (whole and size >= _EXACT_FLOATS):
        return False
    return distance <= (tolerance if whole else max(tolerance, tolerance * size))


# --- values from JSON -------------------------------------------------------------------------------------------------


def _ratio(parts: Any) -> Fraction:
    above, below = map(_read, parts)
    return Fraction(above, below)


def _complex(parts: Any) -> complex:
    real, imaginary = map(_read, parts)
    return complex(real, imaginary)


_READ: Final[Mapping[str, Callable[[Any], Any]]] = {
    "tuple": lambda items: tuple(map(_read, items)),
    "set": lambda items: set(map(_read, items)),
    "dict": lambda pairs: dict(map(_read, pairs)),
    "bytes": lambda text: text.encode("latin-1"),
    "float": float,
    "int": lambda text: int(text, 16),
    "complex": _complex,
    "ratio": _ratio,
}


def _read(value: Any) -> Any:
    """The value that the caller wrote as ``value``.

    Raises:
        ValueError: It wrote no such thing; likewise ``TypeError``, ``ArithmeticError`` and ``RecursionError``.
    """
    if isinstance(value, list):
        return list(map(_read, value))
    if isinstance(value, dict):
        ((name, content),) = value.items()
        if name not in _READ:
            raise ValueError(name)
        try:
            return _READ[name](content)
        except AttributeError as error:
            raise TypeError(name) from error
    return value

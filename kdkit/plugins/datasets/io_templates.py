"""What the problems of ``io-problems`` are put together from. Our own texts; answers are computed, nothing is executed.

A problem reads one line, keeps some of what stands there, changes it, and prints something of what is left. A template
is one choice of these parts; its problems differ in constants, wording and tests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Part", "Problem", "Template", "problem", "templates"]

_LETTERS: Final = "abcdeilmnorstu"
_TESTS: Final = 7
_TRIES: Final = 200


@dataclass(frozen=True, slots=True)
class Part:
    """One operation.

    Attributes:
        name: Of the operation.
        wordings: How a statement may ask for it; ``{k}`` is a constant.
        step: What the reasoning says.
        code: Lines of the program.
        run: What it does to a value, given the constant.
        constants: What ``{k}`` may be; nothing when there is none.
    """

    name: str
    wordings: tuple[str, ...]
    step: str
    code: str
    run: Callable[[Any, Any], Any]
    constants: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Template:
    """Parts in order; the first one is how the line is read."""

    name: str
    parts: tuple[Part, ...]

    @property
    def level(self) -> int:
        """Operations after reading: 1 to 3."""
        return len(self.parts) - 1


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with the reasoning and the program that solve it; the first test is the example of the statement."""

    statement: str
    steps: tuple[str, ...]
    program: str
    tests: tuple[tuple[str, str], ...]


_SMALL: Final = (2, 3, 4, 5)
_READ_NUMBERS: Final = Part(
    "numbers",
    ("Read one line with integers separated by spaces.", "The input is one line of integers separated by spaces."),
    "read the integers of the line into a list.",
    "values = [int(x) for x in input().split()]",
    lambda line, _: [int(x) for x in line.split()],
)
_KEEP: Final = (
    Part("even", ("Keep only the even ones.", "Ignore all odd numbers."), "keep only the even numbers.",
         "values = [v for v in values if v % 2 == 0]", lambda v, _: [x for x in v if x % 2 == 0]),
    Part("odd", ("Keep only the odd ones.", "Ignore all even numbers."), "keep only the odd numbers.",
         "values = [v for v in values if v % 2 != 0]", lambda v, _: [x for x in v if x % 2 != 0]),
    Part("above", ("Keep only those greater than {k}.", "Ignore all that are not greater than {k}."),
         "keep only the numbers greater than {k}.", "values = [v for v in values if v > {k}]",
         lambda v, k: [x for x in v if x > k], (-5, 0, 2, 5, 10)),
    Part("below", ("Keep only those less than {k}.", "Ignore all that are not less than {k}."),
         "keep only the numbers less than {k}.", "values = [v for v in values if v < {k}]",
         lambda v, k: [x for x in v if x < k], (-2, 0, 3, 8, 12)),
)  # fmt: skip
_CHANGE: Final = (
    Part("add", ("Add {k} to each.", "Increase each by {k}."), "add {k} to each number.",
         "values = [v + {k} for v in values]", lambda v, k: [x + k for x in v], (1, 3, 7, 10)),
    Part("times", ("Multiply each by {k}.", "Replace each by {k} times itself."), "multiply each number by {k}.",
         "values = [v * {k} for v in values]", lambda v, k: [x * k for x in v], _SMALL),
    Part("square", ("Square each.", "Multiply each by itself."), "square each number.",
         "values = [v * v for v in values]", lambda v, _: [x * x for x in v]),
    Part("absolute", ("Take the absolute value of each.", "Drop the minus signs."),
         "take the absolute value of each number.", "values = [abs(v) for v in values]",
         lambda v, _: [abs(x) for x in v]),
)  # fmt: skip
_NUMBER_ENDS: Final = (
    Part("sum", ("Print their sum.", "Print what they add up to."), "print the sum.", "print(sum(values))",
         lambda v, _: str(sum(v))),
    Part("max", ("Print the largest.", "Print the maximum."), "print the largest number.", "print(max(values))",
         lambda v, _: str(max(v))),
    Part("min", ("Print the smallest.", "Print the minimum."), "print the smallest number.", "print(min(values))",
         lambda v, _: str(min(v))),
    Part("count", ("Print how many there are.", "Print their count."), "print how many numbers there are.",
         "print(len(values))", lambda v, _: str(len(v))),
    Part("first", ("Print the first one.",), "print the first number.", "print(values[0])", lambda v, _: str(v[0])),
    Part("last", ("Print the last one.",), "print the last number.", "print(values[-1])", lambda v, _: str(v[-1])),
    Part("sorted", ("Print them in increasing order, separated by spaces.",), "print the numbers in increasing order.",
         "print(*sorted(values))", lambda v, _: " ".join(map(str, sorted(v)))),
)  # fmt: skip
_READ_TEXT: Final = Part(
    "text",
    ("Read one line of words.", "The input is one line with words."),
    "read the line.",
    "text = input()",
    lambda line, _: line,
)
_REWRITE: Final = (
    Part("upper", ("Make all letters capital letters.", "Convert it to upper case."), "convert the text to upper case.",
         "text = text.upper()", lambda t, _: t.upper()),
    Part("backwards", ("Reverse it.", "Turn it around, character by character."), "reverse the text.",
         "text = text[::-1]", lambda t, _: t[::-1]),
    Part("without", ("Remove every letter '{k}'.", "Leave out all letters '{k}'."), "remove every letter {k}.",
         "text = text.replace('{k}', '')", lambda t, k: t.replace(k, ""), ("e", "o", "s", "t")),
)  # fmt: skip
_TEXT_ENDS: Final = (
    Part("whole", ("Print the result.",), "print the text.", "print(text)", lambda t, _: t),
    Part("length", ("Print the number of its characters, spaces included.",), "print the length of the text.",
         "print(len(text))", lambda t, _: str(len(t))),
    Part("words", ("Print the number of words.", "Print how many words it has."), "print the number of words.",
         "print(len(text.split()))", lambda t, _: str(len(t.split()))),
    Part("first-word", ("Print the first word.",), "print the first word.", "print(text.split()[0])",
         lambda t, _: t.split()[0]),
    Part("last-word", ("Print the last word.",), "print the last word.", "print(text.split()[-1])",
         lambda t, _: t.split()[-1]),
    Part("twice", ("Print it twice, on two lines.",), "print the text two times.", "print(text)\nprint(text)",
         lambda t, _: f"{t}\n{t}"),
)  # fmt: skip


def templates() -> Iterator[Template]:
    """All templates, the simple ones of a family first."""
    for read, options, ends in (
        (_READ_NUMBERS, (_KEEP, _CHANGE), _NUMBER_ENDS),
        (_READ_TEXT, (_REWRITE,), _TEXT_ENDS),
    ):
        for middle in _choices(options):
            for end in ends:
                if middle or end.name != "whole":
                    parts = (read, *middle, end)
                    yield Template("/".join(part.name for part in parts), parts)


def _choices(options: Sequence[Sequence[Part]]) -> Iterator[tuple[Part, ...]]:
    """At most one of each kind, in order."""
    if not options:
        yield ()
        return
    for first in ((), *((part,) for part in options[0])):
        for rest in _choices(options[1:]):
            yield (*first, *rest)


def problem(template: Template, number: int) -> Problem:
    """The problem with this number of a template; the same one for ever."""
    rng = random.Random(f"{template.name}/{number}")  # noqa: S311 - a seed, no secret
    chosen = [(part, rng.choice(part.constants) if part.constants else None) for part in template.parts]
    wordings = [rng.choice(part.wordings).format(k=k) for part, k in chosen]
    tests = _tests(chosen, rng)
    given, expected = tests[0]
    example = f"Example input:\n{given}\nExample output:\n{expected}"
    return Problem(
        statement=f"{' '.join(wordings)}\n\n{example}",
        steps=tuple(part.step.format(k=k) for part, k in chosen),
        # Braces stand nowhere else in the code.
        program="\n".join(part.code.format(k=k) for part, k in chosen),
        tests=tuple(tests),
    )


def _tests(chosen: Sequence[tuple[Part, Any]], rng: random.Random) -> list[tuple[str, str]]:
    """Inputs with their outputs: something is left in each of them, and the outputs are not all the same."""
    tests: list[tuple[str, str]] = []
    for _ in range(_TRIES):
        line = _numbers(rng) if chosen[0][0] is _READ_NUMBERS else _words(rng)
        value: Any = line
        for part, k in chosen[:-1]:
            value = part.run(value, k)
        if not value or (isinstance(value, str) and (not value.split() or value != value.strip())):
            continue
        tests.append((line, chosen[-1][0].run(value, chosen[-1][1])))
        if len(tests) >= _TESTS and len({expected for _, expected in tests}) > _TESTS // 2:
            break
    return tests[-_TESTS:]


def _numbers(rng: random.Random) -> str:
    return " ".join(str(rng.randint(-20, 20)) for _ in range(rng.randint(3, 8)))


def _words(rng: random.Random) -> str:
    return " ".join("".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 6))) for _ in range(rng.randint(1, 6)))

"""Problem statements and system messages for competitive programming."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from kdkit.api.data import Message
from kdkit.models.examples import json_kind
from kdkit.plugins.datasets.code_prompts import LANGUAGE_NAMES, fenced
from kdkit.plugins.datasets.codeforces_tests import Test
from kdkit.plugins.datasets.values import RowError, optional_text

__all__ = ["PAPER_SYSTEM", "TEMPLATE", "THINK_SYSTEM", "limit", "statement_of", "statement_values"]

THINK_SYSTEM: Final = (
    "Reason before you answer. Write your reasoning between <think> and </think>, in numbered steps that begin with "
    "'Step 1:', 'Step 2:' and so on. After </think> give the complete program in exactly one code block."
)
PAPER_SYSTEM: Final = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think><answer> answer here </answer>"
)
"""The system message of DeepSeek-R1-Zero, word for word, which the paper's GRPO run took over."""
TEMPLATE: Final = (
    "title",
    "description",
    "input_format",
    "output_format",
    "note",
    "examples",
    "limits",
    "language",
    "prompt",
)
"""What a template sees."""
_HEADING: Final = re.compile(r"^#+ [^\n]*\n", re.MULTILINE)
_HIGHEST: Final = 1_000_000
_LIMITS: Final = (("time_limit", "Time limit per test", "s"), ("memory_limit", "Memory limit", "MB"))


def limit(columns: Mapping[str, Any], name: str) -> float | None:
    """The positive number in column ``name``; None when it is missing or null."""
    value = columns.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"{name!r} is {json_kind(value)}, not a number")
    if not 0 < value < _HIGHEST:
        raise RowError(f"{name!r} is {str(value)[:20]}, and limits lie between 0 and {_HIGHEST:,}")
    return float(value)


def statement_values(columns: Mapping[str, Any], examples: list[Test], language: str) -> dict[str, str]:
    """The values for :data:`TEMPLATE`; ``prompt`` is the row's own, or made from the statement where it has none."""
    names = ("title", "description", "input_format", "output_format", "note")
    values = {name: optional_text(columns, name).strip() for name in names}
    limits = [(title, limit(columns, name), unit) for name, title, unit in _LIMITS]
    values["limits"] = "\n".join(f"{title}: {value:g} {unit}" for title, value, unit in limits if value is not None)
    values["examples"] = "\n\n".join(
        f"Input:\n{fenced(test['input'], '')}\nOutput:\n{fenced(test['output'], '')}" for test in examples
    )
    values["language"] = LANGUAGE_NAMES.get(language, language)
    by_file = optional_text(columns, "input_mode") == "file"
    values["prompt"] = optional_text(columns, "prompt").strip() or _prompt(values, language, by_file=by_file)
    return values


def statement_of(columns: Mapping[str, Any], prompt: str | tuple[Message, ...]) -> str:
    """A problem in its own words, for ``decontaminate``.

    Its description, or what stands under the first heading of its prompt, as in open-r1's: the instructions before it
    are the same in all rows, and the sections after it have sentences that hundreds of problems share.
    """
    if description := optional_text(columns, "description").strip():
        return description
    asked = prompt if isinstance(prompt, str) else prompt[-1].content
    _, *sections = _HEADING.split(asked)
    return next((section.strip() for section in sections if section.strip()), asked)


def _prompt(values: Mapping[str, str], language: str, *, by_file: bool) -> str:
    ways = "input.txt and writes to output.txt" if by_file else "standard input and writes to standard output"
    task = (
        f"Solve this programming problem with a {values['language']} program that reads from {ways}. The program has "
        "to stay within the limits on the largest inputs that the statement allows, and prints nothing but the answer."
    )
    sections = (
        (values["title"] or "Problem", values["description"]),
        ("Limits", values["limits"]),
        ("Input", values["input_format"]),
        ("Output", values["output_format"]),
        ("Examples", values["examples"]),
        ("Note", values["note"]),
    )
    statement = (f"# {title}\n\n{body}" for title, body in sections if body)
    return "\n\n".join(
        [task, *statement, f"Put the complete program into one code block that begins with ```{language}."]
    )

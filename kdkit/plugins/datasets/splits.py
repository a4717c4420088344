"""From rows to the examples of one split: identity, duplicates, parts, and how many.

Every decision is a function of the row alone (and of ``split_seed``), so that neither the order of a file nor rows
added to it move a row from one part to another.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from kdkit.api.data import Example, Message, Rows
from kdkit.api.errors import DataError
from kdkit.plugins.datasets.options import SplitOptions
from kdkit.plugins.datasets.values import RowError, SourceRow

__all__ = ["Candidate", "Convert", "Part", "collect", "content_id", "part_of", "prompt_key"]

Prompt: TypeAlias = str | tuple[Message, ...]
Part: TypeAlias = Literal["train", "validation", "test"]
_PROMPT_DIGITS: Final = 16
_ANSWER_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class Candidate:
    """An example and the key that decides its part: :func:`prompt_key` of its prompt as the source had it.

    ``part`` is set where the source itself says which part a row belongs to; the key then gives the order alone.
    """

    key: str
    example: Example
    part: Part | None = None


Convert = Callable[[SourceRow], Candidate | str]
"""Turns a row into a candidate, or into the reason for which it is dropped; raises ``RowError`` for a broken row."""


def prompt_key(*parts: Prompt) -> str:
    """A hash of a prompt as the source has it; case and white space do not count, so near copies share a key."""
    return _digest([_texts(part, lambda text: " ".join(text.casefold().split())) for part in parts])


def content_id(*prompt: Prompt, answers: Sequence[str | None] = ()) -> str:
    """The id of a row that brings none: a hash of its exact prompt, and one of its answers when it has any."""
    first = _digest([_texts(part, str) for part in prompt])[:_PROMPT_DIGITS]
    return f"{first}-{_digest(list(answers))[:_ANSWER_DIGITS]}" if any(answers) else first


def part_of(key: str, options: SplitOptions) -> Part:
    """The part that the prompt with this key belongs to.

    Args:
        key: See :func:`prompt_key`.
        options: The fractions and the seed; ``split`` and ``max_rows`` play no part.
    """
    u = _uniform(f"{options.split_seed}:{key}")
    if u < options.test_fraction:
        return "test"
    return "validation" if u < options.test_fraction + options.validation_fraction else "train"


def collect(
    rows: Iterable[SourceRow], convert: Convert, options: SplitOptions, *, on_error: Literal["fail", "skip"] = "fail"
) -> tuple[Rows, str]:
    """The examples of the chosen split, in hash order, and what happened to all other rows.

    ``counts["read"]`` is the sum of ``kept`` and of all reasons (``broken``, ``duplicate``, ``other-split``,
    ``over-max-rows`` and those of ``convert``).

    Returns:
        The rows, and the first broken row as one line (empty when there is none).

    Raises:
        DataError: A broken row and ``on_error`` is ``fail``; it names file and line.
    """
    counts: Counter[str] = Counter(read=0, kept=0, broken=0)
    seen: dict[str, tuple[int, str]] = {}
    chosen: list[Candidate] = []
    first_broken = ""
    for row in rows:
        counts["read"] += 1
        try:
            candidate = _usable(row, convert, seen)
        except RowError as error:
            if on_error == "fail":
                raise DataError(str(error), where=row.where, hint="mend the row, or set on_error: skip") from error
            counts["broken"] += 1
            first_broken = first_broken or f"{row.where}: {error}"
            continue
        if isinstance(candidate, str):
            counts[candidate] += 1
        elif options.split not in ("all", candidate.part or part_of(candidate.key, options)):
            counts["other-split"] += 1
        else:
            chosen.append(candidate)
    examples = _first(chosen, options, counts)
    counts["kept"] = len(examples)
    return Rows(examples=examples, counts=dict(counts)), first_broken


def _usable(row: SourceRow, convert: Convert, seen: dict[str, tuple[int, str]]) -> Candidate | str:
    if row.problem:
        raise RowError(row.problem)
    candidate = convert(row)
    if isinstance(candidate, str):
        return candidate
    example = candidate.example
    content = hash((example.prompt, example.completion, example.references))
    before, where = seen.setdefault(example.id, (content, row.where))
    if where == row.where:
        return candidate
    if before != content:
        raise RowError(f"has the id {example.id!r} of another row ({where})")
    return "duplicate"


def _first(chosen: list[Candidate], options: SplitOptions, counts: Counter[str]) -> tuple[Example, ...]:
    # Another hash than the one of the parts: with split: all, the first rows would else be those of the test part.
    def place(candidate: Candidate) -> tuple[float, str]:
        return _uniform(f"{options.split_seed}:order:{candidate.key}"), candidate.example.id

    ordered = sorted(chosen, key=place)
    kept = ordered[: options.max_rows]
    if len(kept) < len(ordered):
        counts["over-max-rows"] = len(ordered) - len(kept)
    return tuple(candidate.example for candidate in kept)


def _texts(prompt: Prompt, plain: Callable[[str], str]) -> str | list[list[str]]:
    if isinstance(prompt, str):
        return plain(prompt)
    return [[message.role, plain(message.content)] for message in prompt]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _uniform(text: str) -> float:
    """A number in [0, 1) that is a function of ``text``; 53 bits, so that rounding never gives 1."""
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53

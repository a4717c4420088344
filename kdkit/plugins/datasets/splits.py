"""From rows to the examples of one split: identity, duplicates, parts, and how many.

Every decision is a function of the row alone (and of ``split_seed``), so that neither the order of a file nor rows
added to it move a row from one part to another.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from kdkit.api.data import Example, Message, Rows
from kdkit.api.errors import DataError
from kdkit.plugins.datasets.options import Dedup, SplitOptions
from kdkit.plugins.datasets.selection import Selection
from kdkit.plugins.datasets.values import RowError, SourceRow

__all__ = ["Candidate", "Convert", "Part", "collect", "content_id", "part_of", "prompt_key"]

Prompt: TypeAlias = str | tuple[Message, ...]
Part: TypeAlias = Literal["train", "validation", "test"]
_PROMPT_DIGITS: Final = 16
_ANSWER_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class Candidate:
    """An example and what its source says about it.

    Attributes:
        key: :func:`prompt_key` of the prompt as the source had it, or of what its group has in common. It decides the
            order, and the part when ``part`` does not.
        example: The example.
        part: The part, where the source itself says it or a group decides it.
        text: The prompt's own words, before headings and templates are put around them: what ``decontaminate``
            compares, since fixed sentences would be found in every row. Empty: the example's ``echo``, else its prompt
            without system messages.
        shared: What no two parts may have in common beside the row itself, such as a function that two packages
            carry: a row that shares it with a row of ``test`` stays in no other part.
    """

    key: str
    example: Example
    part: Part | None = None
    text: str = ""
    shared: tuple[str, ...] = ()


Convert = Callable[[SourceRow], Candidate | str]
"""Turns a row into a candidate, or into the reason for which it is dropped; raises ``RowError`` for a broken row."""


def prompt_key(*parts: Prompt) -> str:
    """A hash of a prompt as the source has it; case and white space do not count, so near copies share a key."""
    return _digest([_texts(part, _plain) for part in parts])


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
    rows: Iterable[SourceRow],
    convert: Convert,
    options: SplitOptions,
    *,
    on_error: Literal["fail", "skip"] = "fail",
    excluded: Callable[[Candidate], bool] | None = None,
) -> tuple[Rows, str]:
    """The examples of the chosen split, in hash order, and what happened to all other rows.

    ``counts["read"]`` is the sum of ``kept`` and of all reasons (``broken``, ``duplicate``, ``contaminated``,
    ``other-split``, ``shared-with-other-split``, ``over-max-rows`` and those of ``convert``). Large results lie in a
    temporary file and are read from it row by row.

    Args:
        rows: See :mod:`kdkit.plugins.datasets.readers`. Of rows that can be iterated again, as no iterator can, fewer
            are held for ``max_rows``, and the rare ones that are missed are read once more.
        convert: See :data:`Convert`.
        options: The split, duplicates and how many rows. ``decontaminate`` plays no part, see ``excluded``.
        on_error: What a broken row does.
        excluded: Whether a row of the chosen split is ``contaminated``; it then counts as no copy of another row.

    Returns:
        The rows, and the first broken row as one line (empty when there is none).

    Raises:
        DataError: A broken row and ``on_error`` is ``fail``; it names file and line. Or the rows changed meanwhile.
    """
    counts: Counter[str] = Counter(read=0, kept=0, broken=0)
    once = isinstance(rows, Iterator)
    selection = Selection(options, lambda example: _content(example, options.dedup), counts, hold_all=once)
    first_broken = ""
    for row in rows:
        counts["read"] += 1
        try:
            reason = _select(row, convert, options, selection, excluded)
        except RowError as error:
            if on_error == "fail":
                raise DataError(str(error), where=row.where, hint="mend the row, or set on_error: skip") from error
            counts["broken"] += 1
            first_broken = first_broken or f"{row.where}: {error}"
            continue
        if reason:
            counts[reason] += 1
    if selection.missing:
        _fetch(rows, convert, options, selection)
    examples = selection.examples()
    counts["kept"] = len(examples)
    always = {"read", "kept", "broken"}
    return Rows(examples=examples, counts={k: n for k, n in counts.items() if n or k in always}), first_broken


def _select(
    row: SourceRow,
    convert: Convert,
    options: SplitOptions,
    selection: Selection,
    excluded: Callable[[Candidate], bool] | None,
) -> str:
    """Hand a row to ``selection``, or say why it is dropped."""
    if row.problem:
        raise RowError(row.problem)
    candidate = convert(row)
    if isinstance(candidate, str):
        return candidate
    example = selection.identified(candidate.example)
    part = candidate.part or part_of(candidate.key, options)
    if options.split in ("all", part) and excluded is not None and excluded(candidate):
        return "contaminated"
    selection.add(_place(candidate, options), example, part=part, shared=candidate.shared)
    return ""


def _fetch(rows: Iterable[SourceRow], convert: Convert, options: SplitOptions, selection: Selection) -> None:
    """A second pass for rows that stay but were not held."""
    for row in rows:
        try:
            candidate = "" if row.problem else convert(row)
        except RowError:
            continue
        if isinstance(candidate, Candidate):
            part = candidate.part or part_of(candidate.key, options)
            selection.fetch(_place(candidate, options), candidate.example, part=part)
    if selection.missing:
        raise DataError("the rows changed while they were read", hint="run again when nothing writes to the source")


def _place(candidate: Candidate, options: SplitOptions) -> int:
    # Another hash than the one of the parts: with split: all, the first rows would else be those of the test part.
    return _bits(f"{options.split_seed}:order:{candidate.key}")


def _content(example: Example, dedup: Dedup) -> str:
    """What two rows have in common when they are copies: prompt and answers, or the prompt alone."""
    answers = (example.completion, *example.references) if dedup == "exact" else ()
    return json.dumps([_texts(example.prompt, _plain), [answer and _plain(answer) for answer in answers]])


def _texts(prompt: Prompt, plain: Callable[[str], str]) -> str | list[list[str]]:
    if isinstance(prompt, str):
        return plain(prompt)
    return [[message.role, plain(message.content)] for message in prompt]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _plain(text: str) -> str:
    """``text`` without case, with single blanks for white space."""
    return " ".join(text.casefold().split())


def _uniform(text: str) -> float:
    """A number in [0, 1) that is a function of ``text``; 53 bits, so that rounding never gives 1."""
    return _bits(text) / 2**53


def _bits(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11

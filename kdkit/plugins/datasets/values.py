"""Rows as plain, safe JSON values, whatever file they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from kdkit.models.examples import json_kind

__all__ = ["MAX_DEPTH", "MAX_TEXT", "RowError", "SourceRow", "clean_row", "optional_text", "text"]

MAX_DEPTH: Final = 64
"""Deepest nesting of lists and objects in a row; real rows have less than ten levels."""

MAX_TEXT: Final = 10_000_000
"""Longest single text in a row, in characters."""


class RowError(Exception):
    """One row cannot be used; the text says why, without the place."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it was read.

    Attributes:
        where: ``FILE:LINE``; for tables the number of the row, from 1.
        columns: Plain JSON values; empty when there is a problem.
        problem: Why the row cannot be read, or nothing.
    """

    where: str
    columns: Mapping[str, Any]
    problem: str = ""


def clean_row(value: Any, *, table: bool) -> dict[str, Any]:
    """``value`` as an object of plain JSON values.

    Args:
        value: What the JSON parser or the table reader gave.
        table: Dates and decimals become text and NaN becomes null, as tables write an absent number; in JSON both are
            errors already.

    Raises:
        RowError: Not an object, too deep, or a value that later stages cannot keep (lone surrogates, NUL, NaN, bytes,
            texts beyond :data:`MAX_TEXT`).
    """
    if not isinstance(value, dict):
        raise RowError(f"is {json_kind(value)}, not an object")
    return {_clean_text(key, key): _clean(item, str(key), table=table) for key, item in value.items()}


def text(columns: Mapping[str, Any], name: str) -> str:
    """The text in column ``name``; raises :class:`RowError` when it is missing or no text."""
    if columns.get(name) is None:
        raise RowError(f"has no {name!r} (columns: {', '.join(sorted(columns)) or 'none'})")
    value = columns[name]
    if not isinstance(value, str):
        raise RowError(f"{name!r} is {json_kind(value)}, not text")
    return value


def optional_text(columns: Mapping[str, Any], name: str) -> str:
    """The text in column ``name``, empty when it is missing or null."""
    return "" if columns.get(name) is None else text(columns, name)


def _clean(value: Any, column: str, *, table: bool, depth: int = 1) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _clean_text(value, column)
    if isinstance(value, float):
        return _clean_float(value, column, table=table)
    if depth == MAX_DEPTH:
        raise RowError(f"{column!r} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, list | tuple):
        if len(value) > 1 and set(map(type, value)) == {str}:
            # Columns of tokens: one look at all of them is 20 times as fast as one at each.
            _check_text("".join(value), column, longest=max(map(len, value)))
            return list(value)
        return [_clean(item, column, table=table, depth=depth + 1) for item in value]
    if isinstance(value, dict):
        return {
            _clean_text(key, column): _clean(item, column, table=table, depth=depth + 1) for key, item in value.items()
        }
    if isinstance(value, date | time | timedelta | Decimal | UUID):
        return str(value)
    raise RowError(f"{column!r} holds {type(value).__name__}, which is no JSON value")


def _clean_text(value: Any, column: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"{column!r} has a key that is no text")
    _check_text(value, column, longest=len(value))
    return value


def _check_text(value: str, column: Any, *, longest: int) -> None:
    if longest > MAX_TEXT:
        raise RowError(f"{column!r} is longer than {MAX_TEXT:,} characters")
    if "\0" in value:
        raise RowError(f"{column!r} holds a NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            # The parser joins escaped pairs, so what is left is half a character that no file can hold.
            raise RowError(f"{column!r} holds half of a surrogate pair") from None


def _clean_float(value: float, column: str, *, table: bool) -> float | None:
    if math.isfinite(value):
        return value
    if table and math.isnan(value):
        return None
    raise RowError(f"{column!r} holds a number that is not finite")

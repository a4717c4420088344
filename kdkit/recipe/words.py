"""Wording that several checks share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["any_of", "did_you_mean", "nearest", "shown"]

_LONGEST_TEXT: Final = 60
_LONGEST_LIST: Final = 14


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option that ``name`` is most likely a misspelling of, or None."""
    options = list(options)
    by_lower = {option.lower(): option for option in reversed(options)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def did_you_mean(name: str, options: Iterable[str], *, what: str = "allowed") -> str:
    """``; did you mean 'x'?``, else the options when they are few, else nothing."""
    options = list(options)
    close = nearest(name, options)
    if close is not None:
        return f"; did you mean {close!r}?"
    return f"; {what}: {', '.join(options)}" if 0 < len(options) <= _LONGEST_LIST else ""


def any_of(phrases: Iterable[str]) -> str:
    """``a, b or c``, without repetitions."""
    unique = list(dict.fromkeys(phrases))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


def shown(value: Any) -> str:
    """A value in plain words: ``the string 'x'``, ``the number 1.5``, ``a list``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the string {value if len(value) <= _LONGEST_TEXT else value[: _LONGEST_TEXT - 3] + '...'!r}"
    if isinstance(value, int | float):
        return f"the number {value}"
    return "a list" if isinstance(value, list | tuple) else "a mapping"

"""Printing that survives a reader who has gone away: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from kdkit.api.errors import KdkitError, RecipeError

__all__ = ["debugging", "emit", "emit_json", "log", "print_error", "safely", "shown", "table", "visible", "wrapped"]

# Codes that a terminal obeys (all controls but line feed and tab) and those that reorder or hide text (bidirectional
# overrides, tag characters): a model, a dataset or a file name may contain them.
_OBEYED: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")


def safely(stream: TextIO, write: Callable[[], None]) -> None:
    """Call ``write``; when the reader of ``stream`` is gone (``| head -1``), nothing is written from then on."""
    try:
        write()
        stream.flush()
    except BrokenPipeError:
        # Python would fail once more when it flushes at exit, so the descriptor itself goes to nowhere.
        null = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError):
            os.dup2(null, stream.fileno())
        os.close(null)


def emit(text: str) -> None:
    """One result on stdout."""
    safely(sys.stdout, lambda: print(text))


def shown(path: Path | str) -> str:
    """``path`` as a person would type it: relative when it lies below the current directory."""
    cwd = Path.cwd()
    return str(Path(path).relative_to(cwd)) if Path(path).is_relative_to(cwd) else str(path)


def wrapped(text: str, width: int, indent: int) -> str:
    """``text`` in lines of at most ``width`` characters, further ones indented. Words, such as paths, stay whole."""
    hang = " " * (indent if indent < width // 2 else 2)
    lines = textwrap.wrap(text, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def visible(text: str) -> str:
    """``text`` with everything that a terminal would obey written out as an escape; lines stay lines."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def emit_json(data: Any) -> None:
    """A result as JSON on stdout."""
    # JSON escapes the older half of the control codes itself; the rest can only stand inside strings.
    text = json.dumps(data, indent=2, ensure_ascii=False)
    emit(_OBEYED.sub(lambda found: json.dumps(found[0])[1:-1], text))


def log(text: str) -> None:
    """One line on stderr."""
    safely(sys.stderr, lambda: print(text, file=sys.stderr))


def debugging() -> bool:
    """Whether ``--debug`` stands anywhere on the command line."""
    return "--debug" in sys.argv


def print_error(error: KdkitError) -> None:
    """The error as one line (a recipe's problems as one each), when debugging after its traceback; secrets masked."""
    from kdkit.engine.redact import redact

    if debugging():
        log(redact("".join(traceback.format_exception(error)).rstrip()))
    # Problems of a recipe start with their place, so that editors and grep find it.
    located = isinstance(error, RecipeError) and bool(error.problems)
    log(visible(redact(str(error) if located else f"error: {error}")))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns; the last one is as long as it is."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (header, *rows))
    return "\n".join(line.rstrip() for line in lines)

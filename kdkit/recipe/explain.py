"""Problems as text: one line each, with the source line and a caret where a person looks at a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from kdkit.api.errors import Problem
from kdkit.recipe.yaml import MAX_BYTES

__all__ = ["problem_to_json", "render"]

_WIDTH: Final = 110


def render(problems: Iterable[Problem], *, source: bool = False) -> str:
    """The problems, one ``file:line:column: path: message`` a line.

    Args:
        problems: In the order to print them.
        source: Add below each the line it is about, with a caret under the column.
    """
    files: dict[str, list[str]] = {}
    lines: list[str] = []
    for problem in problems:
        lines.append(str(problem))
        if source and problem.line:
            lines += _excerpt(problem, files)
    return "\n".join(lines)


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """The problem as JSON data for ``--json``; line and column are 0 for a command-line option."""
    return {
        "file": problem.file,
        "line": problem.line,
        "column": problem.column,
        "path": problem.path,
        "message": problem.message,
        "exit_code": int(problem.exit_code),
    }


def _excerpt(problem: Problem, files: dict[str, list[str]]) -> list[str]:
    """The source line and a caret, cut to what fits around the column; nothing when the file cannot be shown."""
    if problem.file not in files:
        files[problem.file] = _lines(Path(problem.file))
    lines = files[problem.file]
    if problem.line > len(lines):
        return []
    written = lines[problem.line - 1].replace("\t", " ")
    column = min(problem.column - 1, len(written))
    start = 0 if len(written) <= _WIDTH else max(0, column - _WIDTH // 2)
    shown = written[start : start + _WIDTH]
    if not shown.isprintable():
        return []
    number = f"{problem.line:>6}"
    return [f"{number} | {shown}", f"{'':>6} | {' ' * (column - start)}^"]


def _lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return []
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")

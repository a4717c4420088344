"""PyYAML's syntax errors in the words of somebody who edits a recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import yaml

__all__ = ["syntax_message"]

_REFERENCE: Final = re.compile(r"(?<![\"'\w])\$\{[^}\"']*\}?")
_PLAIN_WORDS: Final = (
    (r"found character '\\t'", "a tab; indent with spaces"),
    (r"mapping values are not allowed here", "a ':' is not allowed here; check the indentation, or quote the text"),
    (r"could not find expected ':'", "a key without ':'; write key: value"),
    (r"expected <block end>, but found", "the indentation does not fit the lines above"),
    (r"sequence entries are not allowed here", "a list item '- ' is not allowed here; check the indentation"),
    (
        r"expected '<document start>'",
        "text that belongs to nothing; write key: value, and quote text with special signs",
    ),
    (r"found character '([@`%])' that cannot start", r"a value cannot start with \1; quote it"),
)


def syntax_message(error: yaml.MarkedYAMLError, lines: Sequence[str]) -> tuple[yaml.Mark, str]:
    """Where the mistake is, and one line that says what it is."""
    mark = error.problem_mark or error.context_mark
    assert mark is not None  # the scanner and parser always give one
    problem = error.problem or "cannot be read"
    if "end of stream" in problem and error.context_mark is not None and "quoted scalar" in (error.context or ""):
        return error.context_mark, "the quote that opens here is never closed"
    message = next((re.sub(f".*{old}.*", new, problem) for old, new in _PLAIN_WORDS if re.search(old, problem)), None)
    if message is None:
        message = problem.replace("'<stream end>'", "the end of the file")
        opened = error.context_mark
        if opened is not None and "flow" in (error.context or ""):
            bracket = "[" if "sequence" in str(error.context) else "{"
            message = f"in the {bracket} that opens at line {opened.line + 1}, column {opened.column + 1}: {message}"
    written = lines[mark.line] if mark.line < len(lines) else ""
    if re.search(r"[\[{]", written) and (found := _REFERENCE.search(written)):
        message += f'; inside {{ }} and [ ] quote a reference: "{found.group().rstrip("}") + "}"}"'
    return mark, f"not valid YAML: {message}"

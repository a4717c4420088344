"""The program in a completion. Line by line: a regular expression over a hostile text can take forever."""

from __future__ import annotations

from typing import Final

_FENCE: Final = "```"
_PYTHON: Final = frozenset({"python", "python3", "py", "py3"})


def program_of(prompt: str, text: str) -> str | None:
    """The last complete block in Python of the answer, else its last one without a language; None without either."""
    named: str | None = None
    bare: str | None = None
    fence, tag, inside = "", "", list[str]()
    for line in _answer(prompt, text).replace("\r\n", "\n").split("\n"):
        marks = line[: len(line) - len(line.lstrip("`"))]
        if fence and len(marks) >= len(fence) and not line.strip("` "):
            code = "".join(f"{row}\n" for row in inside)
            if tag in _PYTHON:
                named = code
            elif not tag:
                bare = code
            fence = ""
        elif fence:
            inside.append(line)
        elif marks.startswith(_FENCE):
            fence, tag, inside = marks, line.strip("` ").partition(" ")[0].casefold(), []
    return bare if named is None else named


def _answer(prompt: str, text: str) -> str:
    """What follows the thought; nothing when the thought is never closed."""
    _, closed, after = text.rpartition("</think>")
    if not closed and prompt.rstrip().endswith("<think>"):
        return ""
    return after.partition("<think>")[0]

"""The program in an answer. Line by line: a regular expression over a hostile text can take forever."""

from __future__ import annotations

from typing import Final

_PYTHON: Final = frozenset({"python", "python3", "py", "py3"})


def continuation(text: str) -> str:
    """The part of ``text`` that goes on with a function's body: up to a line that begins without white space."""
    kept: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if kept and line.strip() and not line[0].isspace():
            break
        kept.append(line)
    return "\n".join(kept)


def last_block(prompt: str, text: str) -> str | None:
    """The last complete code block in Python after the thought, else the last one without a language, else None."""
    named: str | None = None
    bare: str | None = None
    fence, tag, inside = "", "", list[str]()
    for line in _after_thought(prompt, text).replace("\r\n", "\n").split("\n"):
        marks = line[: len(line) - len(line.lstrip("`"))]
        if fence and len(marks) >= len(fence) and not line.strip("` "):
            code = "\n".join(inside)
            named, bare = (code, bare) if tag in _PYTHON else (named, bare if tag else code)
            fence = ""
        elif fence:
            inside.append(line)
        elif marks.startswith("```"):
            fence, tag, inside = marks, line.strip("` ").partition(" ")[0].casefold(), []
    return bare if named is None else named


def _after_thought(prompt: str, text: str) -> str:
    """What follows the thought; nothing when the thought is never closed."""
    _, closed, after = text.rpartition("</think>")
    if not closed and prompt.rstrip().endswith("<think>"):
        return ""
    return after.partition("<think>")[0]

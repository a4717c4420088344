"""Programs in completions: fenced blocks, line by line, because a regular expression over the text is quadratic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

__all__ = ["Block", "Language", "blocks", "language_of", "last_program", "without_blocks"]

Language: TypeAlias = Literal["python", "cpp"]

_TAGS: Final[dict[str, Language]] = {
    **dict.fromkeys(("python", "python3", "py", "py3"), "python"),
    **dict.fromkeys(("cpp", "c++", "cc", "cxx", "c++17", "c++20", "c++23", "cpp17", "cpp20", "cpp23"), "cpp"),
}
_MARKS: Final = 3
_DEEPEST: Final = 3


@dataclass(frozen=True, slots=True)
class Block:
    """A complete fenced block: its tag in lower case, its code, and the lines it takes with its fences."""

    tag: str
    code: str
    first: int
    last: int


def language_of(name: str) -> Language | None:
    """The language that a tag or a column names; None for one that nothing here runs."""
    return _TAGS.get(name.strip().casefold())


def blocks(text: str) -> Iterator[Block]:
    """Complete blocks: opened and closed by three or more backticks that begin a line indented at most three spaces.

    The closing fence is at least as long as the opening one. A block that is never closed is none.
    """
    marks, tag, opened = 0, "", 0
    inside: list[str] = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n")):
        fence = _fence(line)
        if marks and fence is not None and fence[0] >= marks and not fence[1]:
            yield Block(tag, "".join(f"{code}\n" for code in inside), opened, number)
            marks = 0
        elif marks:
            inside.append(line)
        elif fence is not None:
            (marks, tag), opened, inside = fence, number, []


def _fence(line: str) -> tuple[int, str] | None:
    """How many backticks begin the line and the first word after them; None for a line that is no fence."""
    bare = line.lstrip(" ")
    if len(line) - len(bare) > _DEEPEST or not bare.startswith("`" * _MARKS):
        return None
    after = bare.lstrip("`")
    if "`" in after:
        return None
    # Of "```python title=a.py" the first word counts; "``` x" closes nothing.
    return len(bare) - len(after), next(iter(after.split(maxsplit=1)), "").casefold()


def last_program(text: str, language: Language) -> str | None:
    """The code of the last block in ``language``, else of the last one without a language; None without either."""
    named: str | None = None
    bare: str | None = None
    for block in blocks(text):
        if not block.code.strip():
            continue
        if language_of(block.tag) == language:
            named = block.code
        elif not block.tag:
            bare = block.code
    return bare if named is None else named


def without_blocks(text: str) -> str:
    """The text without its complete blocks."""
    lines = text.replace("\r\n", "\n").split("\n")
    kept: list[str] = []
    start = 0
    for block in blocks(text):
        kept += lines[start : block.first]
        start = block.last + 1
    return "\n".join([*kept, *lines[start:]])

"""The code in a model's answer."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Final

__all__ = ["PYTHON", "code_of"]

PYTHON: Final = frozenset({"python", "py", "python3", "py3"})
"""Words after an opening fence that mean Python."""

# Possessive runs and the look-behind keep a line of a hundred thousand backticks from taking quadratic time.
_OPENING: Final = re.compile(r"(?<!`)(?P<marks>`{3,}+)(?P<info>[^`]*+)$")
_ONE_WORD: Final = re.compile(r"[\w+#.-]*\s*")
_INDENTED_BY: Final = 3


def code_of(answer: str, languages: frozenset[str] | None = PYTHON) -> str:
    """The code that ``answer`` means: its last fenced block in the wanted language, or all of it when it has none.

    A block opens with three or more backticks, also at the end of a line of text (``Solution: ```python``), and closes
    with a line of at least as many, indented at most three spaces more than the line that opened it (so a fence in an
    indented docstring closes nothing), or with such backticks at the end of a line of code. A block that is never
    closed, as in a truncated answer, reaches to the end. Blocks of white space only do not count.

    Of the blocks whose first word after the fence is in ``languages`` (None: of those that have one) the last is taken,
    as an answer corrects its drafts; else the last block without a language; else the last block.
    White space that all lines start with, and around the code, is dropped.
    """
    blocks = [(language, code) for language, code in _blocks(answer) if code.strip()]
    named = [code for language, code in blocks if (bool(language) if languages is None else language in languages)]
    bare = [code for language, code in blocks if not language]
    every = [code for _, code in blocks]
    return _trimmed((named or bare or every or [answer])[-1])


def _trimmed(code: str) -> str:
    return textwrap.dedent(code.replace("\r\n", "\n")).strip()


def _blocks(answer: str) -> Iterator[tuple[str, str]]:
    """``(language, code)`` of each fenced block; the language in lower case."""
    lines: list[str] = []
    closing: re.Pattern[str] | None = None
    language = ""
    for line in answer.split("\n"):
        if closing is None:
            opened = _opened(line)
            if opened is not None:
                (language, closing), lines = opened, []
        elif (match := closing.match(line)) is not None:
            yield language, "\n".join([*lines, match["code"] or ""])
            closing = None
        else:
            lines.append(line)
    if closing is not None:
        yield language, "\n".join(lines)


def _opened(line: str) -> tuple[str, re.Pattern[str]] | None:
    """The language and the pattern of the closing line, when ``line`` opens a block."""
    match = _OPENING.search(line)
    if match is None:
        return None
    before, info = line[: match.start()], match["info"]
    # After text, more than one word is no language: "three backticks (```) open a block".
    if before.strip() and _ONE_WORD.fullmatch(info) is None:
        return None
    indent = 0 if before.strip() else len(before)
    words = info.split()
    return (words[0].lower() if words else ""), _closing(len(match["marks"]), indent + _INDENTED_BY)


def _closing(marks: int, indent: int) -> re.Pattern[str]:
    fence = rf"`{{{marks},}}+\s*$"
    return re.compile(rf"[ \t]{{0,{indent}}}{fence}|(?P<code>(?=\s*+[^\s`])[^`]*+){fence}")

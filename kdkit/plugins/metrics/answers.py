"""The code in a model's answer."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Final

from kdkit.plugins.metrics.python_tree import parses

__all__ = ["PYTHON", "code_of", "reference_code"]

PYTHON: Final = frozenset({"python", "py", "python3", "py3"})
"""Words after an opening fence that mean Python."""

# Possessive runs and the look-behind keep a line of a hundred thousand backticks from taking quadratic time.
_OPENING: Final = re.compile(r"(?<!`)(?P<marks>`{3,}+)(?P<info>[^`]*+)$")
_ONE_WORD: Final = re.compile(r"[\w+#.-]*\s*")
_INLINE: Final = re.compile(r"(`{3,}+)([^`\n]++)\1")
_ITEM: Final = re.compile(r"(?P<indent>\s*)(?:[-*+]|\d{1,9}[.)])\s+(?=\S)")
_WORD: Final = re.compile(r"\w")
_BEFORE: Final = ("", "-", "+")
_INDENTED_BY: Final = 3
_TAB: Final = 4


def code_of(answer: str, languages: frozenset[str] | None = PYTHON) -> str:
    """The code that ``answer`` means: its last fenced block in the wanted language, or all of it when it has none.

    An answer that is a Python program as it stands is its code, whatever its strings and comments hold.

    Else a block opens with three or more backticks, also at the end of a line of text (``Solution: ```python``), on a
    line that is indented at most three spaces, or three more than the text of the list item it stands in: what is
    indented deeper belongs to code, such as the docstring of a function that was cut off. It closes
    with a line of at least as many, indented at most three spaces more than the line that opened it (so a fence in an
    indented docstring closes nothing), or with such backticks at the end of a line of code. A block that is never
    closed, as in a truncated answer, reaches to the end. Blocks of white space only do not count.

    Of the blocks whose first word after the fence is in ``languages`` (None: of those that have one) the last is taken,
    as an answer corrects its drafts; else the last block without a language; else the last block. An answer of one line
    between backticks is the code between them.
    White space that all lines start with, and around the code, is dropped.
    """
    whole = _trimmed(answer)
    if "```" not in whole or parses(whole):
        return whole
    if (inline := _INLINE.fullmatch(whole)) is not None:
        return inline[2].strip()
    blocks = [(language, code) for language, code in _blocks(whole) if code.strip()]
    named = [code for language, code in blocks if (bool(language) if languages is None else language in languages)]
    bare = [code for language, code in blocks if not language]
    every = [code for _, code in blocks]
    return _trimmed((named or bare or every or [whole])[-1])


def reference_code(reference: str, languages: frozenset[str] | None = PYTHON) -> str:
    """The code of a reference: all of it, as it is no answer to look for code in.

    Only one that opens with a fence is read as an answer, for test sets whose references are chat answers.
    """
    whole = _trimmed(reference)
    return code_of(whole, languages) if whole.startswith("```") else whole


def _trimmed(code: str) -> str:
    return textwrap.dedent(code.replace("\r\n", "\n")).strip()


def _blocks(answer: str) -> Iterator[tuple[str, str]]:
    """``(language, code)`` of each fenced block; the language in lower case."""
    lines: list[str] = []
    closing: re.Pattern[str] | None = None
    language, text = "", 0
    for line in answer.split("\n"):
        if closing is None:
            text = _item_text(line, text)
            opened = _opened(line, text + _INDENTED_BY)
            if opened is not None:
                (language, closing), lines = opened, []
        elif (match := closing.match(line)) is not None:
            yield language, "\n".join([*lines, match["code"] or ""])
            closing = None
        else:
            lines.append(line)
    if closing is not None:
        yield language, "\n".join(lines)


def _item_text(line: str, text: int) -> int:
    """The column at which the text of the list item around the end of ``line`` starts, 0 outside lists.

    ``text`` is that of the line before. A marker that is indented too far for the list it would belong to is none.
    """
    item = _ITEM.match(line)
    if item is not None and _columns(item["indent"]) <= text + _INDENTED_BY:
        return _columns(item[0])
    return text if not line.strip() or _columns(_indent(line)) >= text else 0


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _columns(space: str) -> int:
    return len(space.expandtabs(_TAB))


def _opened(line: str, deepest: int) -> tuple[str, re.Pattern[str]] | None:
    """The language and the pattern of the closing line, when ``line`` opens a block; not when indented too deep."""
    match = _OPENING.search(line)
    if match is None or _columns(_indent(line)) > deepest:
        return None
    before, info = line[: match.start()], match["info"]
    # The end of what began on the same line: "so ```x = 1```". A fence in a comment of code: " * ```", "/// ```".
    if "```" in before or (before.strip() not in _BEFORE and _WORD.search(before) is None):
        return None
    # After text, more than one word is no language: "three backticks (```) open a block".
    if before.strip() and _ONE_WORD.fullmatch(info) is None:
        return None
    indent = 0 if before.strip() else len(before)
    words = info.split()
    return (words[0].lower() if words else ""), _closing(len(match["marks"]), indent + _INDENTED_BY)


def _closing(marks: int, indent: int) -> re.Pattern[str]:
    fence = rf"`{{{marks},}}+\s*$"
    return re.compile(rf"[ \t]{{0,{indent}}}{fence}|(?P<code>(?=\s*+[^\s`])[^`]*+){fence}")

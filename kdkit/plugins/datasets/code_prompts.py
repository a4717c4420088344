"""What the code datasets share: prompts in the chosen style, code blocks and names of languages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from kdkit.api.data import Message
from kdkit.plugins.datasets.options import StyleOptions
from kdkit.plugins.datasets.prompts import Prompt, template_renderer
from kdkit.plugins.datasets.values import RowError, optional_text

__all__ = ["LANGUAGE_NAMES", "StyledPrompt", "fenced", "language_of", "last_block", "row_language", "styled_prompt"]

LANGUAGE_NAMES: Final[Mapping[str, str]] = {"python": "Python", "cpp": "C++"}
"""Language as kdkit names it to its name in prompts."""
_ALIASES: Final[Mapping[str, Literal["python", "cpp"]]] = {
    "python": "python",
    "python3": "python",
    "py": "python",
    "py3": "python",
    "cpp": "cpp",
    "c++": "cpp",
    "c++17": "cpp",
    "c++20": "cpp",
}
StyledPrompt = Callable[[str, Mapping[str, str]], Prompt]
"""``(text of the chat message, values for a template)`` to a prompt."""
_FENCE: Final = re.compile(r" {0,3}(`{3,})([^`]*)")


def styled_prompt(
    options: StyleOptions,
    names: Sequence[str],
    *,
    paper: Callable[[Mapping[str, str]], str] | None = None,
    system: str | None = None,
) -> StyledPrompt:
    """The function that makes prompts in the chosen style.

    Args:
        options: Style, template and system message.
        names: What a template sees.
        paper: Makes the text of ``prompt_style: paper``, where that is text and no conversation.
        system: The system message of the style, where ``options`` has none.

    Raises:
        DataError: The template is missing or wrong; the returned function raises it when rendering fails.
        EnvironmentUnmet: The template cannot be read.
    """
    if options.template is not None:
        render = template_renderer(options.template, names)
        return lambda _, values: render(values)
    if options.prompt_style == "paper" and paper is not None:
        return lambda _, values: paper(values)
    first = options.system or system
    before = (Message("system", first),) if first else ()
    return lambda body, _: (*before, Message("user", body))


def fenced(code: str, language: str) -> str:
    """``code`` as a block; the fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", code)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{code.strip(chr(10))}\n{fence}"


def last_block(text: str) -> tuple[str, str] | None:
    """Language tag and code of the last complete code block of ``text``, or None."""
    # Line by line, since a regular expression over the whole text is quadratic in fences that are never closed.
    found: tuple[str, str] | None = None
    fence, tag, inside = "", "", list[str]()
    for line in text.split("\n"):
        mark = _FENCE.fullmatch(line)
        if fence and mark and mark[1].startswith(fence) and not mark[2].strip():
            found, fence = (tag, "".join(f"{code}\n" for code in inside)), ""
        elif fence:
            inside.append(line)
        elif mark:
            fence, tag, inside = mark[1], mark[2].strip().lower(), []
    return found


def language_of(name: str) -> Literal["python", "cpp"] | None:
    """The name in kdkit of the language that a column or a code block names; None for an unknown one."""
    return _ALIASES.get(name.strip().lower())


def row_language(columns: Mapping[str, Any], name: str = "language") -> str:
    """The language in column ``name``: ``python``, ``cpp`` or ``other``.

    Raises:
        RowError: No text there.
    """
    given = optional_text(columns, name)
    if not given.strip():
        raise RowError(f"has no {name!r} (columns: {', '.join(sorted(columns)) or 'none'})")
    return language_of(given) or "other"

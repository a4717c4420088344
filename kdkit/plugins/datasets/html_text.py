"""HTML problem statements as text.

One regular expression that looks at every character once: the parser of the standard library raises on some malformed
declarations, and what is read here may be anything.
"""

from __future__ import annotations

import html
import re
from typing import Final

__all__ = ["html_to_text"]

_BLOCKS: Final = frozenset({"p", "div", "pre", "br", "li", "ul", "ol", "tr", "table", "section", "hr", "dt", "dd"})
# Possessive: without a ">" there is no other way to divide the text between name and attributes.
_TAG: Final = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*+)[^<>]*+>|<![^<>]*+>")


def html_to_text(source: str) -> str:
    """``source`` without tags; headings start with ``#``, list items with ``-``, and ``pre`` keeps its lines."""
    parts: list[str] = []
    place = verbatim = 0
    for tag in _TAG.finditer(source):
        parts.append(_plain(source[place : tag.start()], verbatim=verbatim > 0))
        place = tag.end()
        closes, name = tag[1] == "/", (tag[2] or "").lower()
        parts.append(_mark(name, closes=closes))
        if name == "pre":
            verbatim = max(0, verbatim + (-1 if closes else 1))
    parts.append(_plain(source[place:], verbatim=verbatim > 0))
    lines = (line.strip(" ") for line in "".join(parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _plain(piece: str, *, verbatim: bool) -> str:
    # Entities last, so that "&lt;b&gt;" stays text. A NUL or half of a surrogate pair becomes U+FFFD there.
    return html.unescape(piece if verbatim else re.sub(r"\s+", " ", piece))


def _mark(name: str, *, closes: bool) -> str:
    if re.fullmatch("h[1-6]", name):
        return "\n" if closes else "\n\n# "
    if name == "li" and not closes:
        return "\n- "
    return "\n" if name in _BLOCKS else ""

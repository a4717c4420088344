"""Text of strangers, made safe to show: nothing invisible, nothing that reorders the page, nothing endless."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kdkit.report.figures import MISSING

__all__ = ["Clipped", "clean", "clip", "shorten", "typeset"]

# Line feeds and tabs stay. What reorders text beyond its own element (bidirectional overrides) or cannot be encoded
# (surrogates) is written out.
_UNSEEN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ufffe\uffff\ud800-\udfff]"
)
_PICTURES: Final = 0x2400
"""Unicode's pictures of the control characters, in their order."""


def clean(text: str) -> str:
    """``text`` with every character visible: controls as pictures (␆), overrides by code (⟨U+202E⟩)."""
    return _UNSEEN.sub(_shown, text.replace("\r\n", "\n").replace("\r", "\n"))


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(_PICTURES + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


@dataclass(frozen=True, slots=True)
class Clipped:
    """A text's beginning, and how many characters of it were left out."""

    text: str
    left_out: int = 0


def clip(text: str, characters: int, lines: int = 40) -> Clipped:
    """At most ``characters`` characters and ``lines`` lines of ``text``."""
    kept = "\n".join(text[:characters].split("\n", lines)[:lines])
    return Clipped(kept, len(text) - len(kept))


def shorten(text: str, characters: int) -> str:
    """``text`` on one line, with an ellipsis in the place of what is beyond ``characters``."""
    line = " ".join(text[: 4 * characters].split())
    cut = len(line) > characters or len(text) > 4 * characters
    return f"{line[: characters - 1]}…" if cut else line


def typeset(number: str) -> str:
    """A number's text with a real minus sign, and a dash where there is no number."""
    return "–" if number == MISSING else number.replace("-", "−")

"""From text to words that can be counted, for text of any script and for text that is no language at all."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["has_content", "words"]

# Scripts that put no space between words: every character is one.
_UNSPACED: Final = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD: Final = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_LONGEST: Final = 24
_PIECE: Final = 8


def words(text: str) -> list[str]:
    """Runs of letters and digits, case-folded; of scripts without spaces every character.

    A run of more than 24 characters is no word but a way to write one thing many times without a space: it is cut into
    pieces of 8.
    """
    found: list[str] = []
    for match in _WORD.finditer(text.casefold()):
        word = match[0]
        if len(word) <= _LONGEST:
            found.append(word)
        else:
            found += [word[start : start + _PIECE] for start in range(0, len(word), _PIECE)]
    return found


def has_content(text: str) -> bool:
    """Whether there is a letter or a digit; white space, punctuation and invisible characters say nothing."""
    return _WORD.search(text) is not None

"""From text to tokens: words of any script, and tokens of program code."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Final

__all__ = ["Stemmer", "code_tokens", "unicode_words"]

# Marks belong to the letter before them: Indic vowel signs and decomposed accents are no word boundary.
_SEPARATORS: Final = ("Z", "P", "S", "C")
# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana and Han.
_UNSPACED: Final = re.compile(
    r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    r"\U00020000-\U0003ffff])"
)

_OPERATORS: Final = (
    r">>>= <=> <<= >>= \*\*= //= ->\* === !== >>> \.\.\. := == != <= >= -> => << >> \*\* // && \|\| \+\+ -- :: "
    r"\+= -= \*= /= %= &= \|= \^= @= \?\? \?\. \#\# /\* \*/"
)
_CODE: Final = re.compile(
    r"""
      \"\"\" | \'\'\'
    | (?<!\w) (?: [rRbBuUfFtT]{1,2} | u8R? | [uUL]R? )? (["'])(?!\1\1) (?: \\. | (?!\1)[^\\\n] )*+ \1
    | 0[xXbBoO][0-9a-fA-F_]+ \w*
    | (?: [0-9][0-9_]*+ (?:'[0-9]+)*+ \.?[0-9_]* | \.[0-9][0-9_]* ) (?:[eE][+-]?[0-9]+)? \w*
    | \w+
    | \\[^\w\s]
    | """
    + _OPERATORS.replace(" ", "|")
    + r"| \S",
    re.VERBOSE,
)


class Stemmer:
    """The English Porter stemmer of NLTK, which rouge-score uses, with a memory for words seen before."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = lru_cache(maxsize=1 << 16)(PorterStemmer().stem)


def unicode_words(text: str) -> list[str]:
    """Runs of letters, digits and marks of any script, case-folded and in composed form.

    Every character of a script without spaces between words (Han, kana, Thai, Lao, Burmese, Khmer) is a word.
    """
    plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    spaced = "".join(" " if unicodedata.category(char).startswith(_SEPARATORS) else char for char in plain)
    return _UNSPACED.sub(r" \1 ", spaced).split()


def code_tokens(code: str) -> list[str]:
    """Tokens of program text in any language, also of text that does not parse.

    From the left, the first rule that fits:

    1. a triple quote; what stands between two of them is split by the same rules,
    2. a string in single or double quotes that ends on its line, with its prefix (``rb""``, ``L""``), as one token,
    3. a number, with its exponent, suffix and digit separators,
    4. a name or word: a run of letters, digits and underscores of any script,
    5. a backslash with the punctuation mark after it,
    6. an operator of several characters of Python or the C family, the longest first,
    7. any other character.

    White space separates and counts for nothing else, so indentation and line breaks do not matter. Upper and lower
    case differ, and comments are text like any other. Characters are compared in composed form (NFC).
    """
    return [match.group() for match in _CODE.finditer(unicodedata.normalize("NFC", code))]

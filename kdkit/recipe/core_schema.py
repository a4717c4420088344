"""Plain scalars of the YAML 1.2 core schema.

PyYAML follows YAML 1.1, where ``1e-5`` is text, ``on`` is true, ``12:30:45`` is 45045 and ``017`` is 15.
"""

from __future__ import annotations

import math
import re
from typing import Final

__all__ = ["UnsafeScalarError", "clean_text", "plain_scalar"]

_NULL: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL: Final = {text: text.lower() == "true" for text in ("true", "True", "TRUE", "false", "False", "FALSE")}
_INT: Final = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE: Final = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LONGEST_NUMBER: Final = 64
_FORBIDDEN: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


class UnsafeScalarError(ValueError):
    """A scalar that JSON, a file name or a log line could not carry."""


def plain_scalar(text: str) -> str | int | float | bool | None:
    """The value of an unquoted scalar.

    Raises:
        UnsafeScalarError: An infinite or undefined number, or one of absurd length.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _NOT_FINITE.fullmatch(text):
        raise UnsafeScalarError(f"{text} is not allowed; write a finite number")
    if _INT.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if math.isinf(number):
            raise UnsafeScalarError("the number is too large for a float")
        return number
    return clean_text(text)


def _integer(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise UnsafeScalarError(f"the number has {len(text)} digits; at most {_LONGEST_NUMBER} are allowed")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def clean_text(text: str) -> str:
    r"""``text`` with surrogate pairs joined (JSON writes ``\ud83d\ude00`` for one character).

    Raises:
        UnsafeScalarError: A control character or half a surrogate pair.
    """
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not text.isascii() else text
    lone = joined.count("\ufffd") > text.count("\ufffd")
    found = _FORBIDDEN.search(joined)
    if lone:
        raise UnsafeScalarError("the text contains half a surrogate pair")
    if found:
        raise UnsafeScalarError(f"the text contains the control character U+{ord(found.group()):04X}")
    return joined

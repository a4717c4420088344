"""Signature and docstring of a Python function, found by its tokens, so that the rest keeps every character.

Tokens, not a syntax tree: reading stops after the docstring, code in Python 2 (which CodeSearchNet has) and
functions cut from their class work, and no depth of nesting can exhaust the interpreter's stack.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from tokenize import TokenInfo
from typing import Final

__all__ = ["FunctionText", "NotAFunctionError", "read_function"]

_OPENING: Final = frozenset("([{")
_CLOSING: Final = frozenset(")]}")
_QUIET: Final = (tokenize.COMMENT, tokenize.NL)


class NotAFunctionError(Exception):
    """The text does not start as a Python function or class does."""


@dataclass(frozen=True, slots=True)
class FunctionText:
    """Parts of a function's source.

    Attributes:
        signature: From ``def`` (or ``class``) to the colon.
        code: The source without its docstring; the source itself when it has none.
        has_docstring: Whether it has one.
        only_docstring: Nothing follows the docstring, so that ``code`` is no function.
    """

    signature: str
    code: str
    has_docstring: bool
    only_docstring: bool


def read_function(source: str) -> FunctionText:
    """The parts of the function or class that ``source`` starts with; decorators and comments may come first.

    Raises:
        NotAFunctionError: It starts otherwise, or cannot be read up to the end of its docstring.
    """
    try:
        # The first token is read when the reader is made.
        reader = _Reader(source)
        start = reader.skip_decorators()
        colon = reader.find_colon()
        strings, end = reader.docstring()
        signature = source[reader.offset(start.start) : reader.offset(colon.end)]
        if not strings:
            return FunctionText(signature, source, has_docstring=False, only_docstring=False)
        return reader.without(signature, strings[0], end)
    except (tokenize.TokenError, SyntaxError, StopIteration) as error:
        raise NotAFunctionError(f"cannot be read as Python: {error or 'ends within its head'}") from error


class _Reader:
    """One pass over the tokens of a function's head."""

    def __init__(self, source: str) -> None:
        self._source = source
        # StringIO ends lines at "\n" alone, as the offsets below do. Python ends them at a lone "\r" too; both are one
        # character, so that offsets stay those of the source.
        lines = re.sub(r"\r(?!\n)", "\n", source)
        self._tokens: Iterator[TokenInfo] = tokenize.generate_tokens(io.StringIO(lines).readline)
        self._starts = [0, *accumulate(len(line) + 1 for line in lines.split("\n"))]
        self._indented = False
        self._token = next(self._tokens)

    def offset(self, place: tuple[int, int]) -> int:
        """Where in the source a token's (line, column) is."""
        line, column = place
        return min(self._starts[min(line, len(self._starts)) - 1] + column, len(self._source))

    def skip_decorators(self) -> TokenInfo:
        """The token of ``def`` or ``class`` (or of ``async`` before it), which becomes the current one."""
        while True:
            self._skip(*_QUIET, tokenize.INDENT, tokenize.NEWLINE)
            if self._token.string != "@":
                break
            while self._token.type not in (tokenize.NEWLINE, tokenize.ENDMARKER):
                self._advance()
        start = self._token
        if start.string == "async":
            self._advance()
        if self._token.string not in ("def", "class"):
            raise NotAFunctionError(f"starts with {start.string[:20]!r}, not with a function")
        return start

    def find_colon(self) -> TokenInfo:
        """The colon that ends the head; the token after it becomes the current one."""
        depth = 0
        while depth or self._token.string != ":":
            if self._token.type == tokenize.OP:
                depth += (self._token.string in _OPENING) - (self._token.string in _CLOSING)
            if self._token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
                raise NotAFunctionError("its head has no colon")
            self._advance()
        colon = self._token
        self._advance()
        return colon

    def docstring(self) -> tuple[list[TokenInfo], TokenInfo]:
        """The tokens of the docstring (none when there is none), and the token that ends its statement."""
        self._skip(*_QUIET, tokenize.NEWLINE, tokenize.INDENT)
        found, depth, strings = [], 0, 0
        # Python takes a string in parentheses for a docstring too.
        while self._is_string() or (self._token.string == "(" and not strings) or (self._token.string == ")" and depth):
            depth += (self._token.string == "(") - (self._token.string == ")")
            strings += self._token.type == tokenize.STRING
            found.append(self._token)
            self._advance()
            if depth:
                self._skip(*_QUIET)
        self._skip(tokenize.COMMENT)
        if self._token.type not in (tokenize.NEWLINE, tokenize.ENDMARKER) and self._token.string != ";":
            return [], self._token
        return (found if strings else []), self._token

    def without(self, signature: str, first: TokenInfo, end: TokenInfo) -> FunctionText:
        """The function without the statement from ``first`` to ``end``."""
        start, stop = self.offset(first.start), self.offset(end.end)
        line = self._starts[first.start[0] - 1]
        alone = not self._source[line:start].strip()
        self._advance()
        if end.string == ";":
            self._skip(tokenize.COMMENT)
            if self._token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
                # Nothing follows on this line.
                end, stop = self._token, self.offset(self._token.end)
                self._advance()
        self._skip(*_QUIET)
        only = self._token.type in (tokenize.DEDENT, tokenize.ENDMARKER)
        # What follows the line of a one-line body is no part of the function.
        only = only or (end.string != ";" and not self._indented)
        if end.string == ";":
            stop += len(self._source[stop:]) - len(self._source[stop:].lstrip(" \t"))
        elif alone:
            start = line
        else:
            # "def f(): '...'" without anything after it: the line's end stays.
            stop = self.offset(end.start)
        code = self._source[:start] + self._source[stop:]
        return FunctionText(signature, code, has_docstring=True, only_docstring=only)

    def _is_string(self) -> bool:
        prefix = self._token.string[:3].partition("'")[0].partition('"')[0]
        return self._token.type == tokenize.STRING and not set(prefix) & set("bBfF")

    def _skip(self, *kinds: int) -> None:
        while self._token.type in kinds:
            self._advance()

    def _advance(self) -> None:
        if self._token.type == tokenize.ENDMARKER:
            return
        self._indented = self._indented or self._token.type == tokenize.INDENT
        self._token = next(self._tokens)

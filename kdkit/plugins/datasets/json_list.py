"""The items of a JSON list, one after the other, whatever the size of the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from kdkit.api.errors import DataError

__all__ = ["list_items"]

_CHUNK: Final = 2**16
_LONGEST_WORD: Final = 16
"""More characters than a literal or a pair of escapes has; numbers that are cut are no errors."""
_BLANK: Final = re.compile(r"[ \t\n\r]*")


def list_items(stream: IO[bytes], file: Path, *, longest: int) -> Iterator[tuple[str, Any]]:
    """Every item of the list in ``stream``, with its place (``FILE:[NUMBER]``).

    Memory is bounded by one item. NaN and infinities are numbers here, for the caller to refuse with the item alone.

    Args:
        stream: UTF-8, with or without a byte order mark.
        file: What errors name.
        longest: Most characters in one item.

    Raises:
        DataError: No JSON from some item on: nothing after it can be trusted.
    """
    text = _Text(stream, file, longest)
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
    else:
        number = 1
        while True:
            text.where = f"{file}:[{number}]"
            yield text.where, text.item()
            if text.expect(",]") == "]":
                break
            number += 1
    if text.peek():
        raise text.error("more text after the list")


class _Text:
    """A window on the text of a file."""

    def __init__(self, stream: IO[bytes], file: Path, longest: int) -> None:
        self.where = str(file)
        self._stream = stream
        self._longest = longest
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._before = 0
        self._bytes = 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is no blank; nothing at the end."""
        while True:
            self._at = self._end_of_blanks()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, characters: str) -> str:
        """Take one of ``characters``."""
        found = self.peek()
        if not found or found not in characters:
            raise self.error("expecting " + " or ".join(map(repr, characters)))
        self._at += 1
        return found

    def item(self) -> Any:
        """Take one value."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error) and self._more():
                    continue
                raise self.error(error.msg.removesuffix(" at"), error.pos) from error
            except RecursionError as error:
                raise DataError("is nested too deeply", where=self.where) from error
            except ValueError as error:
                raise self.error(str(error)) from error
            if end == len(self._text) and self._more():
                continue
            self._at = end
            return value

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether the end of the window may be what is wrong: in a text, or within a number, a word or an escape."""
        return error.msg.startswith("Unterminated string") or len(self._text) - error.pos < _LONGEST_WORD

    def error(self, what: str, position: int | None = None) -> DataError:
        """An error at a character of the file."""
        place = self._before + (self._at if position is None else position) + 1
        return DataError(f"is not JSON: {what} at character {place:,}", where=self.where)

    def _end_of_blanks(self) -> int:
        match = _BLANK.match(self._text, self._at)
        return match.end() if match else self._at

    def _more(self) -> bool:
        """Widen the window by as much as it holds, so that a long item is not tried too often; false at the end."""
        if self._ended:
            return False
        self._before += self._at
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > self._longest:
            raise DataError(f"is longer than {self._longest:,} characters", where=self.where)
        data = self._stream.read(max(_CHUNK, len(self._text)))
        self._ended = not data
        pending = len(self._decoder.getstate()[0])
        try:
            self._text += self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            place = self._bytes - pending + error.start + 1
            raise DataError(f"is not UTF-8 at byte {place:,}", where=self.where) from error
        self._bytes += len(data)
        return True

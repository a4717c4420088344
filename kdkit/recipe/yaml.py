"""YAML text to located nodes. Strict where YAML is generous, because a recipe that is misread costs GPU hours.

Refused with a place: duplicate keys, keys that are not text, tags, merge keys, ``.inf`` and ``.nan``, several
documents, alias bombs, nesting or files beyond reason, and bytes that are not UTF-8 text.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Final

import yaml
from yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from kdkit.api.errors import Problem, RecipeError
from kdkit.recipe.core_schema import UnsafeScalarError, clean_text, plain_scalar
from kdkit.recipe.nodes import MAX_DEPTH, MAX_NODES, Loc, Mark, Node
from kdkit.recipe.yaml_errors import syntax_message

__all__ = ["MAX_BYTES", "load_bytes", "load_file", "load_option"]

MAX_BYTES: Final = 1_000_000
"""Largest recipe file."""
_LINE_BREAK: Final = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_UNPRINTABLE: Final = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_UTF16: Final = (b"\xff\xfe", b"\xfe\xff")


def load_file(path: Path) -> tuple[Node, list[Problem]]:
    """The tree of a recipe file, and what is wrong with it that did not stop the reading.

    Raises:
        RecipeError: The file cannot be read, or its text has no structure.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        what = (error.strerror or "it is not a file").lower()
        raise _fatal(Mark(str(path)), f"cannot read the recipe: {what}") from None
    return load_bytes(data, str(path))


def load_bytes(data: bytes, file: str) -> tuple[Node, list[Problem]]:
    """Like :func:`load_file`, for text that was read already.

    Raises:
        RecipeError: The text has no structure that can be read.
    """
    if len(data) > MAX_BYTES:
        raise _fatal(Mark(file, 1, 1), f"the file is larger than {MAX_BYTES // 1_000_000} MB; a recipe is not data")
    return _Builder(_decoded(data, file), file).document()


def load_option(text: str, label: str) -> tuple[Node, list[Problem]]:
    """The value of a command-line option, read by the same rules; every place in it is ``label``.

    Raises:
        RecipeError: The text has no structure that can be read.
    """
    try:
        return _Builder(_decoded(text.encode("utf-8", "surrogatepass"), label), label, is_option=True).document()
    except RecipeError as error:
        flat = tuple(dataclasses.replace(problem, line=0, column=0) for problem in error.problems)
        raise RecipeError.of(flat) from None


def _fatal(mark: Mark, message: str, path: Loc = ()) -> RecipeError:
    return RecipeError.of((mark.problem(path, message),))


def _decoded(data: bytes, file: str) -> str:
    if data.startswith(_UTF16):
        raise _fatal(Mark(file, 1, 1), "the file is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        mark = _mark_at(data[: error.start].decode("utf-8"), file)
        raise _fatal(mark, f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
    if found := _UNPRINTABLE.search(text):
        mark = _mark_at(text[: found.start()], file)
        raise _fatal(mark, f"the character U+{ord(found.group()):04X} is not allowed; is this a text file?")
    return text


def _mark_at(before: str, file: str) -> Mark:
    lines = _LINE_BREAK.split(before)
    return Mark(file, len(lines), len(lines[-1]) + 1)


class _Builder:
    """Builds nodes from PyYAML's events, which carry marks and leave the meaning of scalars to us."""

    def __init__(self, text: str, file: str, *, is_option: bool = False) -> None:
        self.file = file
        self.is_option = is_option
        self.lines = _LINE_BREAK.split(text)
        self.loader = yaml.SafeLoader(text)
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node | None] = {}
        self.path: list[str | int] = []
        self.size = 0

    def document(self) -> tuple[Node, list[Problem]]:
        """The only document of the text."""
        try:
            return self._document(), self.problems
        except yaml.MarkedYAMLError as error:
            mark, message = syntax_message(error, self.lines)
            raise self._stop(self._mark(mark), message) from None
        except (ValueError, OverflowError):  # PyYAML passes \U escapes to chr() unchecked
            raise self._stop(self._mark(self.loader.get_mark()), "the escape is not a Unicode character") from None

    def _stop(self, mark: Mark, message: str) -> RecipeError:
        return RecipeError.of((*self.problems, mark.problem(tuple(self.path), message)))

    def _document(self) -> Node:
        self._next()
        event = self._next()
        if isinstance(event, StreamEndEvent):
            return Node(None, Mark(self.file, 0 if self.is_option else 1, 0 if self.is_option else 1))
        node = self._node(self._next(), 1)
        while isinstance(self.loader.peek_event(), DocumentEndEvent):  # type: ignore[no-untyped-call]
            self._next()
        event = self._next()
        if not isinstance(event, StreamEndEvent):
            self._problem(event, "'---' starts a second document; one is allowed")
        return node

    def _next(self) -> Event:
        event: Event = self.loader.get_event()  # type: ignore[no-untyped-call]
        return event

    def _mark(self, mark: Any) -> Mark:
        return Mark(self.file) if self.is_option else Mark(self.file, mark.line + 1, mark.column + 1)

    def _problem(self, event: Event, message: str) -> None:
        self.problems.append(self._mark(event.start_mark).problem(tuple(self.path), message))

    def _node(self, event: Event, depth: int) -> Node:
        if isinstance(event, AliasEvent):
            return self._alias(event)
        mark = self._mark(event.start_mark)
        if depth > MAX_DEPTH:
            self.path.clear()
            raise self._stop(mark, f"nested more than {MAX_DEPTH} levels deep")
        assert isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._problem(event, f"the tag {tag} is not allowed; quote a value to make it text")
        node = self._content(event, mark, depth)
        if event.tag is not None:
            node = dataclasses.replace(node, broken=True)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _content(self, event: Event, mark: Mark, depth: int) -> Node:
        self._count(1, mark)
        if isinstance(event, ScalarEvent):
            return self._scalar(event, mark)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(mark, depth)
        return self._mapping(mark, depth)

    def _count(self, more: int, mark: Mark) -> None:
        # Counted while reading, so that a bomb is refused before anything expands it.
        self.size += more
        if self.size > MAX_NODES:
            raise self._stop(mark, f"more than {MAX_NODES:,} values, aliases expanded")

    def _alias(self, event: AliasEvent) -> Node:
        mark = self._mark(event.start_mark)
        if event.anchor not in self.anchors:
            raise self._stop(mark, f"the alias *{event.anchor} has no anchor &{event.anchor} before it")
        node = self.anchors[event.anchor]
        if node is None:
            raise self._stop(mark, f"the alias *{event.anchor} contains itself")
        self._count(node.size, mark)
        if len(self.path) + node.depth > MAX_DEPTH:
            raise self._stop(mark, f"nested more than {MAX_DEPTH} levels deep")
        return dataclasses.replace(node, mark=mark)

    def _scalar(self, event: ScalarEvent, mark: Mark) -> Node:
        try:
            is_plain = event.style is None and event.tag is None
            return Node(plain_scalar(event.value) if is_plain else clean_text(event.value), mark)
        except UnsafeScalarError as error:
            self._problem(event, str(error))
            return Node(None, mark, broken=True)

    def _sequence(self, mark: Mark, depth: int) -> Node:
        items: list[Node] = []
        while not isinstance(event := self._next(), SequenceEndEvent):
            self.path.append(len(items))
            items.append(self._node(event, depth + 1))
            self.path.pop()
        return Node(tuple(items), mark)

    def _mapping(self, mark: Mark, depth: int) -> Node:
        entries: dict[str, Node] = {}
        keys: dict[str, Mark] = {}
        while not isinstance(event := self._next(), MappingEndEvent):
            key = self._key(event, keys, depth)
            self.path.append(key if key is not None else "?")
            value = self._node(self._next(), depth + 1)
            self.path.pop()
            if key is not None and key not in keys:
                entries[key], keys[key] = value, self._mark(event.start_mark)
        return Node(entries, mark, keys)

    def _key(self, event: Event, keys: dict[str, Mark], depth: int) -> str | None:
        """The text of a key; None after reporting a key that cannot be used."""
        if not isinstance(event, ScalarEvent):
            self._problem(event, "a key must be text, not a list, a mapping or an alias")
            self._node(event, depth + 1)
            return None
        if event.style is None and event.value == "<<":
            self._problem(event, "merge keys (<<) are not supported; use extends: or a variable under vars:")
            return None
        node = self._node(event, depth + 1)
        if node.broken:
            return None
        if not isinstance(node.value, str):
            self._problem(event, f"a key must be text; quote it: {event.value!r}")
            return None
        if node.value in keys:
            first, second = keys[node.value].line, self._mark(event.start_mark).line
            lines = "" if self.is_option else f" on line {second}; it is already on line {first}"
            self.path.append(node.value)
            self._problem(event, f"duplicate key {node.value!r}{lines}")
            self.path.pop()
        return node.value

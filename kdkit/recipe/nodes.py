"""A recipe as a tree of values that know where they were written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from kdkit.api.errors import ExitCode, Problem

__all__ = [
    "MAX_DEPTH",
    "MAX_NODES",
    "Loc",
    "Mark",
    "Node",
    "Report",
    "Trace",
    "dotted",
    "find",
    "follow",
    "plain",
    "scalars",
]

Loc: TypeAlias = tuple[str | int, ...]
Scalar: TypeAlias = str | int | float | bool | None

MAX_DEPTH: Final = 64
"""Deepest nesting of a recipe; deeper input is an attack or an accident."""
MAX_NODES: Final = 100_000
"""Most values of a recipe after aliases and variables are expanded."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a file. Line and column count from 1; both are 0 for a command-line option, named by ``file``."""

    file: str
    line: int = 0
    column: int = 0

    def problem(self, path: Loc, message: str, code: ExitCode = ExitCode.INVALID) -> Problem:
        """A problem at this place, its message on one line."""
        return Problem(self.file, self.line, self.column, dotted(path), " ".join(message.splitlines()), code)


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its place.

    Attributes:
        value: A scalar, a mapping of nodes, or a tuple of nodes. Subtrees may be shared, so never changed.
        mark: Where the value starts.
        keys: For a mapping, where each key stands.
        broken: A problem with this value is already reported; what follows from it is not.
        size: Number of values in the expanded tree.
        depth: Levels of nesting, 1 for a scalar.
    """

    value: Scalar | Mapping[str, Node] | tuple[Node, ...]
    mark: Mark
    keys: Mapping[str, Mark] = field(default_factory=dict)
    broken: bool = False
    size: int = field(init=False)
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        children = self.children()
        object.__setattr__(self, "size", 1 + sum(child.size for _, child in children))
        object.__setattr__(self, "depth", 1 + max((child.depth for _, child in children), default=0))

    def children(self) -> list[tuple[str | int, Node]]:
        """``(key or index, node)`` of a mapping or list; empty for a scalar."""
        if isinstance(self.value, Mapping):
            return list(self.value.items())
        return list(enumerate(self.value)) if isinstance(self.value, tuple) else []

    def child(self, segment: str | int) -> Node | None:
        """The node under a key or index, or None."""
        if isinstance(self.value, Mapping):
            return self.value.get(segment) if isinstance(segment, str) else None
        if isinstance(self.value, tuple) and isinstance(segment, int) and 0 <= segment < len(self.value):
            return self.value[segment]
        return None

    def with_child(self, key: str, node: Node, key_mark: Mark) -> Node:
        """A copy of a mapping with one entry set; an existing key keeps its own mark."""
        entries = dict(self.value) if isinstance(self.value, Mapping) else {}
        return Node({**entries, key: node}, self.mark, {key: key_mark, **self.keys}, self.broken)


def dotted(path: Loc) -> str:
    """``stages.kd.losses.0.weight``."""
    return ".".join(str(segment) for segment in path)


def plain(node: Node) -> Any:
    """The tree as plain JSON data."""
    if isinstance(node.value, Mapping):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, tuple):
        return [plain(child) for child in node.value]
    return node.value


def find(node: Node, path: Sequence[str | int]) -> Node | None:
    """The node at exactly ``path``, or None."""
    for segment in path:
        child = node.child(segment)
        if child is None:
            return None
        node = child
    return node


def scalars(node: Node, path: Loc = ()) -> Iterator[tuple[Loc, Node]]:
    """Every scalar with its path, in written order."""
    children = node.children()
    if not children:
        yield path, node
    for segment, child in children:
        yield from scalars(child, (*path, segment))


@dataclass(frozen=True, slots=True)
class Trace:
    """Where a validation location leads in the written tree.

    Attributes:
        path: The segments that exist in the tree.
        node: The node there.
        tags: Segments that do not exist (a union's branch, a missing key), each with the path length it appeared at.
    """

    path: Loc
    node: Node
    tags: tuple[tuple[int, str | int], ...]


def follow(node: Node, loc: Sequence[str | int]) -> Trace:
    """Walk along ``loc`` and step over what the tree does not have.

    Validation adds segments that nobody wrote: index 0 where one mapping stands for a list of one, and the names of
    union branches.
    """
    path: list[str | int] = []
    tags: list[tuple[int, str | int]] = []
    for segment in loc:
        child = node.child(segment)
        if child is not None:
            node = child
            path.append(segment)
        elif segment != 0 or not isinstance(node.value, Mapping) or (tags and tags[-1][0] == len(path)):
            tags.append((len(path), segment))
    return Trace(tuple(path), node, tuple(tags))


class Report:
    """Collects the problems of one composed recipe."""

    def __init__(self, root: Node) -> None:
        self.root = root
        self.problems: list[Problem] = []

    def mark_of(self, loc: Loc, *, at_key: bool = False) -> tuple[Loc, Mark] | None:
        """The written path and place that ``loc`` leads to; None inside a value that is broken already."""
        path = follow(self.root, loc).path
        node, mark = self.root, self.root.mark
        for segment in path:
            if node.broken:
                return None
            parent, node = node, node.child(segment) or node
            at_key_mark = parent.keys.get(segment) if at_key and isinstance(segment, str) else None
            mark = at_key_mark or node.mark
        return None if node.broken else (path, mark)

    def add(
        self,
        loc: Loc,
        message: str,
        *,
        at_key: bool = False,
        unwritten: Loc = (),
        code: ExitCode = ExitCode.INVALID,
    ) -> None:
        """Report a problem, unless it lies in a value that is broken already.

        Args:
            loc: Path of the value; segments that the tree does not have are stepped over.
            message: What is wrong.
            at_key: The problem is the last key itself, not its value.
            unwritten: Rest of the path that is meant and was not written, such as a missing key.
            code: What the command exits with when every problem has this code.
        """
        place = self.mark_of(loc, at_key=at_key)
        if place is not None:
            self.problems.append(place[1].problem((*place[0], *unwritten), message, code))

"""One tree from a recipe file, what it extends, its variables and the command line's overrides.

Precedence, weakest first: the extended file, the file, ``--var``, ``--set``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from kdkit.api.errors import Problem, RecipeError
from kdkit.recipe.nodes import MAX_DEPTH, MAX_NODES, Loc, Mark, Node, dotted, find
from kdkit.recipe.paths import exists, is_relative, placed
from kdkit.recipe.variables import TOO_LARGE, Variables
from kdkit.recipe.words import did_you_mean, shown
from kdkit.recipe.yaml import load_file, load_option

__all__ = ["TOP_LEVEL", "Composed", "compose"]

TOP_LEVEL: Final = ("kdkit", "name", "seed", "extends", "vars", "requires", "plugins", "stages", "track")
"""Keys of a recipe, in the order people write them."""
_MAX_CHAIN: Final = 8


@dataclass(frozen=True, slots=True)
class Composed:
    """The tree with ``extends`` merged, variables substituted and overrides applied; None when that is impossible."""

    root: Node | None
    problems: tuple[Problem, ...]


def compose(path: Path, sets: Sequence[str] = (), variables: Sequence[str] = ()) -> Composed:
    """Read and compose a recipe. Raises nothing: every mistake is a problem with its place."""
    problems: list[Problem] = []
    try:
        tree = _with_base(path, path.parent, (), problems)
    except RecipeError as error:
        return Composed(None, (*problems, *error.problems))
    given = _options(variables, "--var", problems)
    scope = Variables(tree.child("vars"), given, problems)
    tree = scope.substitute(tree)
    for label, target, value in _options(sets, "--set", problems):
        tree = _set(tree, label, target, scope.substitute_value(value, target), problems)
    if tree.size > MAX_NODES or tree.depth > MAX_DEPTH:
        problems.append(tree.mark.problem((), TOO_LARGE))
        return Composed(None, tuple(problems))
    return Composed(tree, tuple(problems))


def _with_base(path: Path, home: Path, chain: tuple[Path, ...], problems: list[Problem]) -> Node:
    """The tree of ``path`` merged over the file it extends."""
    tree, found = load_file(path)
    problems += found
    if not isinstance(tree.value, Mapping):
        what = "the file is empty" if tree.value is None else f"a recipe is a mapping, got {shown(tree.value)}"
        raise RecipeError.of((tree.mark.problem((), f"{what}; start with kdkit: 1"),))
    if path.parent != home:
        tree = _absolute(tree, path.parent)
    extends = tree.child("extends")
    if extends is None or extends.broken:
        return tree
    base = _base_path(path, extends, chain)
    return _merged(_with_base(base, home, (*chain, _identity(path)), problems), tree)


def _base_path(path: Path, extends: Node, chain: tuple[Path, ...]) -> Path:
    def refuse(message: str) -> RecipeError:
        return RecipeError.of((extends.mark.problem(("extends",), message),))

    if not isinstance(extends.value, str) or not extends.value:
        raise refuse(f"wants the path of one recipe file, got {shown(extends.value)}")
    if "${" in extends.value:
        raise refuse("variables cannot be used here; write the path")
    base = placed(extends.value, path.parent)
    files = (*chain, _identity(path))
    if _identity(base) in files:
        cycle = (*files[files.index(_identity(base)) :], base)
        raise refuse(f"recipes extend each other in a cycle: {' -> '.join(file.name for file in cycle)}")
    if len(files) >= _MAX_CHAIN:
        raise refuse(f"more than {_MAX_CHAIN} files extend one another")
    if not exists(base, file=True):
        raise refuse(f"no such file: {base}")
    return base


def _identity(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for a loop of links


def _merged(base: Node, over: Node) -> Node:
    """``over`` laid over ``base``: mappings merge, everything else replaces.

    Two mappings that choose different components (``use:``, ``kind:``) do not merge either: the parameters of one
    component mean nothing to another.
    """
    if not isinstance(base.value, Mapping) or not isinstance(over.value, Mapping) or _chooses_other(base, over):
        return over
    entries = dict(base.value)
    for key, node in over.value.items():
        entries[key] = _merged(entries[key], node) if key in entries else node
    return Node(entries, over.mark, {**base.keys, **over.keys}, base.broken or over.broken)


def _chooses_other(base: Node, over: Node) -> bool:
    for key in ("use", "kind"):
        before, after = base.child(key), over.child(key)
        if before is not None and after is not None and before.value != after.value:
            return True
    return False


def _absolute(node: Node, directory: Path) -> Node:
    """The tree with relative and home paths made absolute, because it moves away from ``directory``."""
    if isinstance(node.value, Mapping):
        return replace(node, value={key: _absolute(child, directory) for key, child in node.value.items()})
    if isinstance(node.value, tuple):
        return replace(node, value=tuple(_absolute(child, directory) for child in node.value))
    if isinstance(node.value, str) and is_relative(node.value):
        return replace(node, value=str(placed(node.value, directory.absolute())))
    return node


def _options(texts: Sequence[str], option: str, problems: list[Problem]) -> list[tuple[Mark, str, Node]]:
    """``(label, target, value)`` of each ``TARGET=VALUE``."""
    parsed = []
    for number, text in enumerate(texts, 1):
        label = Mark(f"{option} #{number}")
        target, equals, value = text.partition("=")
        if not equals or not target.strip():
            wants = "NAME=VALUE" if option == "--var" else "PATH=VALUE, such as stages.kd.max_steps=50"
            problems.append(label.problem((), f"wants {wants}, got {shown(text)}"))
            continue
        try:
            node, found = load_option(value, label.file)
        except RecipeError as error:
            problems += error.problems
            continue
        problems += found
        parsed.append((label, target.strip(), _absolute(node, Path.cwd())))
    return parsed


def _set(root: Node, label: Mark, target: str, value: Node, problems: list[Problem]) -> Node:
    segments = target.split(".")
    message = _refused_target(root, segments)
    if message is None:
        try:
            return _replaced(root, segments, (), label, value)
        except _NoSuchPlaceError as error:
            message = str(error)
    problems.append(label.problem((target,), message))
    return root


def _refused_target(root: Node, segments: Sequence[str]) -> str | None:
    first = segments[0]
    if not all(segments) or len(segments) > MAX_DEPTH // 2:
        return "is not a path of keys joined by dots"
    if first not in TOP_LEVEL:
        return f"unknown key {first!r}{did_you_mean(first, TOP_LEVEL)}"
    if first in {"vars", "extends"}:
        return "set a variable with --var NAME=VALUE" if first == "vars" else "cannot be overridden"
    stages = find(root, ("stages",))
    if first == "stages" and len(segments) > 1 and stages is not None and segments[1] not in stages.keys:
        return f"no stage {segments[1]!r}{did_you_mean(segments[1], stages.keys, what='stages')}"
    return None


class _NoSuchPlaceError(Exception):
    """An override names a place that the recipe does not have."""


def _replaced(node: Node, segments: Sequence[str], done: Loc, label: Mark, value: Node) -> Node:
    """A copy of ``node`` with ``value`` at ``segments``; mappings that lack are made, for the schema to judge."""
    if not segments:
        return value
    head, rest = segments[0], segments[1:]
    if isinstance(node.value, tuple):
        index = int(head) if head.isascii() and head.isdecimal() else -1
        if not 0 <= index < len(node.value):
            allowed = f"0 to {len(node.value) - 1}" if node.value else "none, the list is empty"
            raise _NoSuchPlaceError(f"{dotted(done)} has no index {head!r}; allowed: {allowed}")
        items = list(node.value)
        items[index] = _replaced(items[index], rest, (*done, head), label, value)
        return replace(node, value=tuple(items))
    if node.value is not None and not isinstance(node.value, Mapping):
        raise _NoSuchPlaceError(f"{dotted(done)} is {shown(node.value)}, which has no key {head!r}")
    if head == "0" and node.child("use") is not None:
        return _replaced(node, rest, done, label, value)
    child = node.child(head) or Node({}, label)
    base = node if isinstance(node.value, Mapping) else Node({}, label)
    return base.with_child(head, _replaced(child, rest, (*done, head), label, value), label)

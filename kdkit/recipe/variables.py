"""Whole-value substitution of ``${vars.NAME}``. There is no expression language."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from kdkit.api.errors import Problem
from kdkit.recipe.nodes import MAX_DEPTH, MAX_NODES, Loc, Mark, Node
from kdkit.recipe.words import did_you_mean, shown

__all__ = ["STAGE_REFERENCE", "TOO_LARGE", "UNTOUCHED", "Variables"]

STAGE_REFERENCE: Final = re.compile(r"\$\{stages\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\}")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_VARIABLE: Final = re.compile(r"\$\{vars\.([^{}]*)\}")
TOO_LARGE: Final = f"more than {MAX_NODES:,} values or {MAX_DEPTH} levels once variables are expanded"
UNTOUCHED: Final = frozenset({"vars", "extends"})
"""Top-level keys in which nothing is substituted; they are gone once a recipe is composed."""


class Variables:
    """The variables of one recipe.

    Args:
        declared: The ``vars`` mapping of the recipe, or None.
        given: ``(label, name, value)`` of each ``--var``.
        problems: Receives what is wrong.
    """

    def __init__(self, declared: Node | None, given: Sequence[tuple[Mark, str, Node]], problems: list[Problem]) -> None:
        self.problems = problems
        self.raw: dict[str, Node] = {}
        self.resolved: dict[str, Node] = {}
        self.open: list[str] = []
        self.level = 0
        self.usable = declared is None or not declared.broken
        if declared is not None and self.usable:
            self._declare(declared)
        for label, name, value in given:
            self._give(label, name, value)
        for name, node in self.raw.items():
            if name not in self.resolved:
                self._resolve(name, node)

    def _declare(self, declared: Node) -> None:
        if not isinstance(declared.value, Mapping):
            if declared.value is not None:
                self.usable = False
                message = f"wants a mapping of names to values, got {shown(declared.value)}"
                self.problems.append(declared.mark.problem(("vars",), message))
            return
        for name, node in declared.value.items():
            self.raw[name] = node
            if not _NAME.fullmatch(name):
                message = f"a variable's name is letters, digits, - and _, got {name!r}"
                self.problems.append(declared.keys[name].problem(("vars", name), message))

    def _give(self, label: Mark, name: str, value: Node) -> None:
        if name in self.raw:
            self.raw[name] = value
            return
        if self.usable:
            self.problems.append(label.problem((), self._unknown(name)))

    def _unknown(self, name: str) -> str:
        hint = did_you_mean(name, self.raw, what="variables") if self.raw else "; the recipe has no vars:"
        return f"no variable {name!r}{hint}"

    def _resolve(self, name: str, node: Node, level: int = 0) -> Node:
        # A chain of deeply nested variables would otherwise exhaust the stack before its result could be measured.
        self.open.append(name)
        self.level += level
        value = self._substituted(node, ("vars", name))
        self.level -= level
        self.open.pop()
        self.resolved[name] = value
        return value

    def substitute(self, root: Node) -> Node:
        """The recipe with every variable replaced, except in ``vars`` and ``extends`` themselves."""
        if not isinstance(root.value, Mapping):
            return root
        entries = {
            key: node if key in UNTOUCHED else self._substituted(node, (key,)) for key, node in root.value.items()
        }
        return replace(root, value=entries)

    def substitute_value(self, node: Node, target: str) -> Node:
        """The value of the override of ``target`` with every variable replaced."""
        return self._substituted(node, (target,))

    def _substituted(self, node: Node, path: Loc) -> Node:
        if isinstance(node.value, Mapping):
            items = {key: self._substituted(child, (*path, key)) for key, child in node.value.items()}
            return self._bounded(replace(node, value=items), path)
        if isinstance(node.value, tuple):
            values = tuple(self._substituted(child, (*path, index)) for index, child in enumerate(node.value))
            return self._bounded(replace(node, value=values), path)
        if not isinstance(node.value, str) or "${" not in node.value or STAGE_REFERENCE.fullmatch(node.value):
            return node
        return self._reference(node, node.value, path)

    def _bounded(self, node: Node, path: Loc) -> Node:
        if node.size <= MAX_NODES and node.depth <= MAX_DEPTH:
            return node
        return self._broken(Node(None, node.mark), path, TOO_LARGE)

    def _reference(self, node: Node, text: str, path: Loc) -> Node:
        match = _VARIABLE.fullmatch(text)
        if match is None:
            return self._broken(node, path, _why_refused(text))
        name = match.group(1)
        if name in self.open:
            cycle = " -> ".join((*self.open[self.open.index(name) :], name))
            return self._broken(node, path, f"variables form a cycle: {cycle}")
        if name in self.resolved:
            return self.resolved[name]
        if name not in self.raw:
            return self._broken(node, path, self._unknown(name)) if self.usable else replace(node, broken=True)
        if self.level + len(path) + self.raw[name].depth > MAX_DEPTH:
            return self._broken(node, path, TOO_LARGE)
        return self._resolve(name, self.raw[name], len(path))

    def _broken(self, node: Node, path: Loc, message: str) -> Node:
        self.problems.append(node.mark.problem(path, message))
        return replace(node, broken=True)


def _why_refused(text: str) -> str:
    forms = "${vars.NAME} or ${stages.NAME.OUTPUT}"
    inner = re.search(r"\$\{([^}]*)\}?", text)
    what = inner.group(1) if inner else ""
    if _VARIABLE.search(text) or STAGE_REFERENCE.search(text):
        return f"a reference must be the whole value, got {shown(text)}; put the full text into one variable"
    if what.startswith("stages"):
        return f"a stage's output is written ${{stages.NAME.OUTPUT}}, got {shown(text)}"
    if what.startswith("env"):
        return f"environment variables are not read, got {shown(text)}; pass the value with --var NAME=VALUE"
    return f"the only references are {forms}, got {shown(text)}"

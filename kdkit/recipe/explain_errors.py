"""Pydantic's validation errors as problems of a recipe, in plain words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from pydantic_core import ErrorDetails

from kdkit.api.errors import ExitCode
from kdkit.recipe.nodes import Loc, Report, find, follow
from kdkit.recipe.words import any_of, did_you_mean, nearest, shown

__all__ = ["report_errors"]

_WANTS: Final[Mapping[str, str]] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "none_required": "null",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dataclass_type": "a mapping",
    "finite_number": "a finite number",
}
_CONSTRAINTS: Final[Mapping[str, str]] = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}
_LITERAL: Final = re.compile(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|[^\s,]+")
_NUMERIC: Final = frozenset({"a number", "a whole number"})
_OWN_WORDS: Final = re.compile(r"(Value error|Assertion failed), ")


class KeysAt(Protocol):
    """Keys that a mapping may have, by its path below the validated mapping."""

    def __call__(self, loc: Loc, instead: Any = None, /) -> list[str]:
        """``instead``: What to suppose at ``loc`` instead of what is written."""


@dataclass(frozen=True, slots=True)
class _Located:
    """An error with its place.

    Attributes:
        item: What pydantic says.
        path: The written path it leads to.
        unwritten: Keys below it that are meant and not written.
        root: Where the union stands whose branch failed; ``path`` when there is no union.
        branch: Name of that branch, or None.
    """

    item: ErrorDetails
    path: Loc
    unwritten: Loc
    root: Loc
    branch: str | int | None

    @property
    def wants(self) -> list[str]:
        """What the place wants, when the value as a whole is of the wrong type; else empty."""
        kind, context = self.item["type"], self.item.get("ctx", {})
        if kind in _WANTS:
            return [_WANTS[kind]]
        if kind in {"literal_error", "enum"}:
            return [word for word in _LITERAL.findall(str(context["expected"])) if word != "or"]
        if kind == "ref" and "forms" in context:
            return [str(context["forms"])]
        if kind == "component" and "example" in context:
            return [f"a {context['kind']} such as {context['example']}"]
        return []


def report_errors(
    report: Report,
    prefix: Loc,
    errors: Sequence[ErrorDetails],
    *,
    keys_at: KeysAt,
    skip_lookups: bool = False,
) -> None:
    """Add one problem for each mistake.

    Args:
        report: Receives the problems.
        prefix: Path of the validated mapping in the recipe.
        errors: ``ValidationError.errors()`` of it.
        keys_at: Which keys were possible.
        skip_lookups: Leave out components that were not found, because a plugin that may bring them did not load.
    """
    unions: dict[Loc, list[_Located]] = {}
    for error in errors:
        if skip_lookups and "exit_code" in error.get("ctx", {}):
            continue
        located = _locate(report, prefix, error, keys_at)
        if located.branch is None:
            _add(report, prefix, located, keys_at)
        else:
            unions.setdefault(located.root, []).append(located)
    for group in unions.values():
        _add_union(report, prefix, group, keys_at)


def _locate(report: Report, prefix: Loc, error: ErrorDetails, keys_at: KeysAt) -> _Located:
    trace = follow(report.root, (*prefix, *error["loc"]))
    tags = list(trace.tags)
    unwritten: Loc = ()
    if tags and (error["type"] == "missing" or tags[-1][1] in keys_at(trace.path[len(prefix) :])):
        unwritten = (tags.pop()[1],)
    if not tags:
        return _Located(error, trace.path, unwritten, trace.path, None)
    length, branch = tags[0]
    return _Located(error, trace.path, unwritten, trace.path[:length], branch)


def _add_union(report: Report, prefix: Loc, group: list[_Located], keys_at: KeysAt) -> None:
    """Report the branch of a union that the value was meant for; what each branch wants when it fits none."""
    branches: dict[str | int | None, list[_Located]] = {}
    for located in group:
        branches.setdefault(located.branch, []).append(located)
    near = [found for found in branches.values() if not all(e.wants and e.path == e.root for e in found)]
    if near:
        for located in min(near, key=len):
            _add(report, prefix, located, keys_at)
    else:
        _add_wants(report, prefix, group[0], [word for located in group for word in located.wants], keys_at)


def _add(report: Report, prefix: Loc, located: _Located, keys_at: KeysAt) -> None:
    item, path = located.item, located.path
    if item["type"] == "extra_forbidden":
        key = str(path[-1])
        options = keys_at(path[len(prefix) : -1])
        hint = did_you_mean(key, options) or _where_listed(report, path[:-1])
        report.add(path, f"unknown key {key!r}{hint}", at_key=True)
    elif item["type"] == "missing":
        report.add(path, f"missing key {str(item['loc'][-1])!r}", unwritten=located.unwritten)
    elif located.wants:
        _add_wants(report, prefix, located, located.wants, keys_at)
    else:
        code = ExitCode(item.get("ctx", {}).get("exit_code", ExitCode.INVALID))
        report.add(path, _message(item), unwritten=located.unwritten, code=code)


def _where_listed(report: Report, parent: Loc) -> str:
    node = find(report.root, parent)
    chosen = (node.child("use") or node.child("kind")) if node is not None else None
    return f"; its keys: kdkit plugins show {chosen.value}" if chosen is not None else ""


def _add_wants(report: Report, prefix: Loc, located: _Located, wants: Sequence[str], keys_at: KeysAt) -> None:
    value = located.item["input"]
    hint = ""
    if isinstance(value, str):
        chooses = "use" in keys_at(located.path[len(prefix) :], {"use": value})
        hint = _hint(value, wants, chooses=chooses)
    report.add(located.path, f"wants {any_of(wants)}, got {shown(value)}{hint}", unwritten=located.unwritten)


def _hint(value: str, wants: Sequence[str], *, chooses: bool) -> str:
    close = nearest(value, [word[1:-1] for word in wants if word.startswith("'")])
    if close is not None:
        return f"; did you mean {close!r}?"
    if chooses and re.fullmatch(r"[\w./-]+", value):
        return f"; write {{use: {value}}}"
    number = value.replace("_", "").replace(",", "")
    if _NUMERIC & set(wants) and re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", number):
        return f"; write {number}"
    return ""


def _short(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _message(item: ErrorDetails) -> str:
    template = _CONSTRAINTS.get(item["type"])
    if template is None:
        return _OWN_WORDS.sub("", item["msg"], count=1)
    context = item.get("ctx", {})
    message = template.format_map({key: _short(value) for key, value in context.items()})
    value = item["input"]
    return f"{message}, got {len(value) if isinstance(value, list | dict) else shown(value)}"

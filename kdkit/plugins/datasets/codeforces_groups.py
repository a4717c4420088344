"""Which problems are the same under several ids: divisions of a contest share some, and rows name them as aliases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kdkit.models.examples import json_kind
from kdkit.plugins.datasets.splits import content_id
from kdkit.plugins.datasets.values import RowError, SourceRow, text

__all__ = ["aliases", "label", "problem_groups", "problem_id"]


def label(columns: Mapping[str, Any], name: str) -> str:
    """The text or whole number in column ``name`` as text, empty when it is missing or null."""
    value = columns.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise RowError(f"{name!r} is {json_kind(value)}, neither text nor a whole number")
    return "" if value is None else str(value).strip()


def problem_id(columns: Mapping[str, Any]) -> str:
    """The id of the problem that a row is about; without one a hash of its statement.

    Raises:
        RowError: Neither ids nor a statement.
    """
    contest, index = label(columns, "contest_id"), label(columns, "index")
    return (
        label(columns, "id")
        or (f"{contest}/{index}" if contest and index else "")
        or content_id(text(columns, "description"))
    )


def aliases(columns: Mapping[str, Any]) -> list[str]:
    """The other ids of the problem."""
    given = columns.get("aliases") or []
    if not isinstance(given, list) or not all(isinstance(alias, str) for alias in given):
        raise RowError("'aliases' is not a list of texts")
    return [name for alias in given if (name := alias.strip())]


def problem_groups(rows: Iterable[SourceRow]) -> dict[str, str]:
    """Of every problem that has aliases, the smallest id among all that are one problem with it.

    1000/A may name 999/C while 999/C names nothing or 998/F, so all rows have to be seen before any has its part.
    Rows that cannot be read are passed over.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = parent[above]
            name = above
        return name

    for row in rows:
        try:
            names = [] if row.problem else aliases(row.columns)
            problem = problem_id(row.columns) if names else ""
        except RowError:
            continue
        for alias in names:
            first, second = sorted((root(problem), root(alias)))
            parent[second] = first
    return {name: root(name) for name in parent}

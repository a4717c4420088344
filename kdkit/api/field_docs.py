"""The string below each field of a parameter class.

pydantic can read these itself (``use_attribute_docstrings``), but finds each class through the frames of the
interpreter, which took a quarter of the time of every command that loads plugins. Here a module is parsed once.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from importlib.util import decode_source
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias, cast

__all__ = ["field_docs"]

_Docs: TypeAlias = Mapping[str, Mapping[str, str]]
"""Qualified name of a class to the texts of its fields."""

_latest: tuple[ModuleSpec, _Docs] | None = None
"""Classes of one module are made one after the other."""


def field_docs(cls: type) -> Mapping[str, str]:
    """Field to its text, of the fields that ``cls`` itself declares; empty where its module has no source."""
    global _latest  # noqa: PLW0603 - a cache of one entry
    spec = getattr(sys.modules.get(cls.__module__), "__spec__", None)
    if spec is None:
        return {}
    if _latest is None or _latest[0] is not spec:
        _latest = (spec, _read(spec))
    return _latest[1].get(cls.__qualname__, {})


def _read(spec: ModuleSpec) -> _Docs:
    try:
        source = _source(spec)
        return dict(_classes(ast.parse(source).body, "")) if source else {}
    except (OSError, ImportError, SyntaxError, ValueError):
        return {}  # such as a file that is gone: a text that is missing stops nobody


def _source(spec: ModuleSpec) -> str | None:
    get_source = getattr(spec.loader, "get_source", None)
    if get_source is not None:
        return cast("str | None", get_source(spec.name))
    # Loaders that change code, such as pytest's, need not tell it.
    return decode_source(Path(spec.origin).read_bytes()) if spec.origin else None


def _classes(body: Iterable[ast.AST], prefix: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            name = f"{prefix}{statement.name}"
            yield name, dict(_texts(statement.body))
            yield from _classes(statement.body, f"{name}.")
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _classes(statement.body, f"{prefix}{statement.name}.<locals>.")
        else:
            for part in ("body", "handlers", "orelse", "finalbody"):  # of if, try and with
                yield from _classes(getattr(statement, part, ()), prefix)


def _texts(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            value = text.value.value if isinstance(text.value, ast.Constant) else None
            if isinstance(value, str):
                yield field.target.id, cleandoc(value)

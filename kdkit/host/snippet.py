"""YAML to paste into a recipe: what a component requires is filled in, what it takes besides is commented out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kdkit.api.params import Params
from kdkit.api.protocols import KIND_OF_PROTOCOL
from kdkit.api.slots import Component, Ref
from kdkit.host.describe import describe_params, field_key, is_union, unwrap, yaml_flow
from kdkit.host.records import Entry

if TYPE_CHECKING:
    from kdkit.host.catalog import Catalog

__all__ = ["yaml_snippet"]

_LIST_SLOTS: Final[Mapping[str, str]] = {
    "loss": "losses",
    "reward": "rewards",
    "metric": "metrics",
    "tracker": "track",
}
"""Component kinds that recipes name in lists, and the usual key of the list."""
_REFERENCES: Final[Mapping[str, str]] = {
    "model": "ORG/NAME",
    "dataset": "./data.jsonl",
    "scores": "${stages.NAME.scores}",
    "report": "${stages.NAME.report}",
}
_MAX_DEPTH: Final = 4


def yaml_snippet(entry: Entry, catalog: Catalog) -> str:
    """A block for a recipe that names ``entry``; capitals and ``./...`` paths are to be replaced."""
    name = entry.qualified_name if catalog.is_ambiguous(entry) else entry.name
    if entry.kind == "stage":
        body = [f"kind: {name}", *_body(entry.spec.params, catalog)]
        return _block("stages:", "  ", [f"{entry.name}:", *(f"  {line}" for line in body)])
    body = [f"use: {name}", *_body(entry.spec.params, catalog)]
    if entry.kind in _LIST_SLOTS:
        first, *rest = body
        return _block(f"{_LIST_SLOTS[entry.kind]}:", "  ", [f"- {first}", *(f"  {line}" for line in rest)])
    return _block("data:" if entry.kind == "dataset" else f"{entry.kind}:", "  ", body)


def _block(head: str, indent: str, lines: Iterable[str]) -> str:
    return "\n".join([head, *(f"{indent}{line}" for line in lines)]) + "\n"


def _body(params: type[Params], catalog: Catalog) -> Iterator[str]:
    for key, value in _required(params, catalog, 0).items():
        yield f"{key}: {yaml_flow(value)}"
    top = {field_key(name, field) for name, field in params.model_fields.items() if not field.is_required()}
    for doc in describe_params(params):
        if doc.name in top:
            yield f"# {doc.name}: {doc.default}"


def _required(params: type[BaseModel], catalog: Catalog, depth: int) -> dict[str, Any]:
    return {
        field_key(name, field): _example(field.annotation, field.metadata, catalog, depth)
        for name, field in params.model_fields.items()
        if field.is_required()
    }


def _example(annotation: Any, metadata: Iterable[Any], catalog: Catalog, depth: int) -> Any:
    """A value of the right type within its bounds; validators that a plugin adds may want another one."""
    annotation, marks = unwrap(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    marks = (*metadata, *marks)
    if is_union(annotation):
        first = next(argument for argument in arguments if argument is not type(None))
        return _example(first, marks, catalog, depth)
    if origin is Literal:
        return arguments[0]
    if isinstance(origin, type) and arguments:
        example = _generic_example(origin, arguments, catalog, depth)
        return example * max(1, _Bounds(marks).length) if isinstance(example, list) else example
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _required(annotation, catalog, depth + 1) if depth < _MAX_DEPTH else {}
    return _scalar(annotation, _Bounds(marks))


def _generic_example(origin: type, arguments: tuple[Any, ...], catalog: Catalog, depth: int) -> Any:
    if issubclass(origin, Component):
        return _component(KIND_OF_PROTOCOL[arguments[0]], catalog, depth)
    if issubclass(origin, Ref):
        return _REFERENCES.get(arguments[0].type_name, "./path")
    if issubclass(origin, Mapping):
        return {"NAME": _example(arguments[1], (), catalog, depth)}
    if origin is tuple and arguments[-1] is not ...:
        return [_example(argument, (), catalog, depth) for argument in arguments]
    return [_example(arguments[0], (), catalog, depth)]


def _component(kind: str, catalog: Catalog, depth: int) -> dict[str, Any]:
    """The installed component of ``kind`` that asks for least; of teachers, the one that gives most."""
    entries = [entry for entry in catalog.entries(kind) if not catalog.is_ambiguous(entry)]
    if not entries or depth >= _MAX_DEPTH:
        return {"use": "NAME"}
    simplest = min(entries, key=_demands)
    return {"use": simplest.name, **_required(simplest.spec.params, catalog, depth + 1)}


def _demands(entry: Entry) -> tuple[int, int]:
    required = sum(field.is_required() for field in entry.spec.params.model_fields.values())
    return required, -len(getattr(entry.spec, "gives", ()))


class _Bounds:
    """The numeric bounds among the marks of a field; infinite where there is none."""

    def __init__(self, marks: Iterable[Any]) -> None:
        flat = [part for mark in marks for part in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]

        def bound(name: str) -> list[float]:
            return [value for mark in flat if (value := getattr(mark, name, None)) is not None]

        self.low = max([*bound("gt"), *bound("ge")], default=-math.inf)
        self.high = min([*bound("lt"), *bound("le")], default=math.inf)
        self.open_low = self.low in bound("gt")
        self.step = max(bound("multiple_of"), default=0)
        self.length = int(max(bound("min_length"), default=0))


def _scalar(annotation: Any, bounds: _Bounds) -> Any:
    if annotation is bool:
        return False
    if annotation is int:
        return _integer(bounds)
    if annotation is float:
        return _number(bounds)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return next(iter(annotation)).value
    if isinstance(annotation, type) and issubclass(annotation, Path):
        return "./file"
    return "TEXT".ljust(bounds.length, "X")


def _integer(bounds: _Bounds) -> int:
    step = int(bounds.step) or 1
    if math.isinf(bounds.low):
        return step if step <= bounds.high else math.ceil(bounds.high) - 1
    low = math.floor(bounds.low) + 1 if bounds.open_low else math.ceil(bounds.low)
    return -(-low // step) * step


def _number(bounds: _Bounds) -> float:
    if not bounds.open_low and not math.isinf(bounds.low):
        return float(bounds.low)
    if math.isinf(bounds.low):
        return 1.0 if bounds.high > 1 else bounds.high - 1.0
    return bounds.low + 1.0 if math.isinf(bounds.high) else (bounds.low + bounds.high) / 2

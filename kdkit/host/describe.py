"""Parameters as text: one table for ``kdkit plugins show`` and for the docs."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kdkit.api.params import Params, Runtime, iter_fields
from kdkit.api.protocols import KIND_OF_PROTOCOL
from kdkit.api.slots import Component, OneOrMore, Ref, Weighted

__all__ = ["ParamDoc", "describe_params", "field_key", "is_union", "param_names", "plain", "unwrap", "yaml_flow"]

_ONE_OR_MORE: Final = get_args(OneOrMore)[1]
_BOUNDS: Final = {
    "gt": "> {}",
    "ge": ">= {}",
    "lt": "< {}",
    "le": "<= {}",
    "multiple_of": "multiple of {}",
    "min_length": "length >= {}",
    "max_length": "length <= {}",
    "pattern": "matches {}",
}
_SCALARS: Final[Mapping[Any, str]] = {Any: "any", None: "null", type(None): "null", Path: "path"}

Nested: TypeAlias = tuple[str, type[BaseModel]]


@dataclass(frozen=True, slots=True)
class ParamDoc:
    """One parameter as text; nested parameters have dotted names (``sampling.top_p``, ``tests[].name``)."""

    name: str
    type: str
    default: str
    constraint: str
    doc: str


def describe_params(params: type[Params]) -> list[ParamDoc]:
    """The parameters of a component in declaration order, nested ones below the one that holds them.

    ``default`` is YAML, or ``required``. ``constraint`` says ``runtime`` for parameters that change speed or
    verbosity only and so never enter a content key.
    """
    return list(_rows(params, None, "", ()))


def _rows(
    model: type[BaseModel], values: BaseModel | None, prefix: str, outer: tuple[type[BaseModel], ...]
) -> Iterator[ParamDoc]:
    for name, field in model.model_fields.items():
        key = prefix + field_key(name, field)
        value = _default(field) if values is None else getattr(values, name)
        yield ParamDoc(
            name=key,
            type=_type_text(field.annotation, field.metadata),
            default=value if isinstance(value, _Word) else yaml_flow(plain(value)),
            constraint=constraint_text(field.metadata),
            doc=" ".join((field.description or "").split()),
        )
        for suffix, nested in dict.fromkeys(_nested(field.annotation)):
            if nested not in (*outer, model):
                given = value if isinstance(value, nested) else None
                yield from _rows(nested, given, f"{key}{suffix}.", (*outer, model))


def param_names(params: type[BaseModel]) -> list[str]:
    """Dotted names of the parameters of a component, those of nested models too, but not of items of lists.

    Runs no code of the component, which defaults may.
    """
    return list(_names(params, "", ()))


def _names(model: type[BaseModel], prefix: str, outer: tuple[type[BaseModel], ...]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = prefix + field_key(name, field)
        yield key
        for suffix, nested in dict.fromkeys(_nested(field.annotation)):
            if not suffix and nested not in (*outer, model):
                yield from _names(nested, f"{key}.", (*outer, model))


def field_key(name: str, field: FieldInfo) -> str:
    """The key under which a recipe sets the field."""
    return field.alias or name


class _Word(str):
    """A default that is not YAML."""

    __slots__ = ()


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return _Word("required")
    if field.default_factory_takes_validated_data:
        return _Word("from other parameters")
    try:
        return field.get_default(call_default_factory=True)
    except Exception as exc:  # noqa: BLE001 - code of a plugin: what is wrong with it stands in its place
        return _Word(f"raises {type(exc).__name__}")


# --- types ------------------------------------------------------------------------------------------------------------


def _type_text(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    annotation, marks = unwrap(annotation)
    if _ONE_OR_MORE in (*metadata, *marks):
        item = _type_text(get_args(annotation)[0])
        return f"{item} or list of them"
    text = _bare_text(annotation)
    inner = constraint_text(marks)
    return f"{text} ({inner})" if inner else text


def unwrap(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type inside ``Annotated`` and type aliases, and the marks found on the way."""
    marks: tuple[Any, ...] = ()
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            marks += tuple(more)
        elif hasattr(annotation, "__value__"):
            annotation = annotation.__value__
        else:
            return annotation, marks


def _bare_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if origin is Literal:
        return " | ".join(map(yaml_literal, arguments))
    if is_union(annotation):
        return " | ".join(dict.fromkeys(map(_type_text, arguments)))
    if isinstance(origin, type) and arguments:
        return _generic_text(origin, arguments) or str(annotation)
    if isinstance(annotation, type):
        return _class_text(annotation)
    return str(annotation).removeprefix("typing.")


def is_union(annotation: Any) -> bool:
    """Whether ``annotation`` is ``X | Y`` in either spelling."""
    return get_origin(annotation) in (Union, types.UnionType)


def _generic_text(origin: type, arguments: tuple[Any, ...]) -> str:
    if issubclass(origin, Component):
        weighted = "weighted " if issubclass(origin, Weighted) else ""
        return f"{weighted}{KIND_OF_PROTOCOL[arguments[0]]} component"
    if issubclass(origin, Ref):
        return f"{arguments[0].type_name} reference"
    if issubclass(origin, Mapping):
        return f"mapping of {_type_text(arguments[0])} to {_type_text(arguments[1])}"
    if origin is tuple and arguments[-1] is not ...:
        return f"[{', '.join(map(_type_text, arguments))}]"
    return f"list of {_type_text(arguments[0])}" if issubclass(origin, Iterable) else ""


def _class_text(annotation: type) -> str:
    if issubclass(annotation, Enum):
        return " | ".join(yaml_literal(member.value) for member in annotation)
    if issubclass(annotation, BaseModel | Mapping):
        return "mapping"
    return "list" if issubclass(annotation, list | tuple | set | frozenset) else annotation.__name__.lower()


def yaml_literal(value: object) -> str:
    """A literal as a reader of YAML knows it: text in quotes, so that it is not taken for a type."""
    return f'"{value}"' if isinstance(value, str) else yaml_flow(value)


def constraint_text(metadata: list[Any] | tuple[Any, ...]) -> str:
    """Bounds such as ``> 0, <= 1``; empty when there are none."""
    if _ONE_OR_MORE in metadata:
        return ""
    parts: list[str] = []
    for mark in metadata:
        if isinstance(mark, FieldInfo):
            parts += filter(None, [constraint_text(mark.metadata)])
        elif isinstance(mark, Runtime):
            parts.append("runtime")
        else:
            bounds = ((text, getattr(mark, name, None)) for name, text in _BOUNDS.items())
            parts += [text.format(bound) for text, bound in bounds if bound is not None]
    return ", ".join(parts)


def _nested(annotation: Any) -> Iterator[Nested]:
    """Parameter models inside ``annotation``, each with the suffix that reaches it."""
    annotation, _ = unwrap(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "", annotation
    elif is_union(annotation):
        for argument in arguments:
            yield from _nested(argument)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        yield from ((f".NAME{suffix}", model) for suffix, model in _nested(arguments[1]))
    elif origin in (list, tuple, set, frozenset):
        for argument in arguments:
            yield from ((f"[]{suffix}", model) for suffix, model in _nested(argument))


# --- values -----------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """``value`` as a recipe would write it: mappings, lists and scalars."""
    if isinstance(value, Component):
        return {"use": value.name, **plain(value.extra), **plain(value.params)}
    if isinstance(value, BaseModel):
        given = value.model_fields_set
        return {name: plain(item) for name, item in iter_fields(value) if name in given}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Enum):
        return plain(value.value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def yaml_flow(value: Any) -> str:
    """``value`` as YAML on one line."""
    if isinstance(value, float):
        return repr(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    text = text.strip().removesuffix("\n...").strip()
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text

"""What a parameter model accepts at a place: the keys of a mapping, and the references of unvalidated data.

Validation itself is pydantic's. This walk over annotations serves the messages: which keys were possible where one
is unknown, and which references a stage makes although some other parameter of it is wrong.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeAlias, Union

from pydantic import BaseModel

from kdkit.api.artifacts import Artifact
from kdkit.api.errors import KdkitError
from kdkit.api.protocols import KIND_OF_PROTOCOL
from kdkit.api.slots import Component, Lookup, ModelOptions, Ref
from kdkit.recipe.nodes import Loc

__all__ = ["keys_at", "references"]

Annotation: TypeAlias = Any


def keys_at(
    params: type[BaseModel], data: Any, path: Sequence[str | int], lookup: Lookup, instead: Any = None
) -> list[str]:
    """Keys that the mapping at ``path`` of ``data`` may have; empty when any key may stand there.

    ``instead``: What to suppose at ``path`` instead of what ``data`` has there.
    """
    places: list[Annotation] = [params]
    for segment in path:
        places = [child for place in places for child in _children(place, data, segment, lookup)]
        data = _item(data, segment)
    data = data if instead is None else instead
    return list(dict.fromkeys(key for place in places for key in _keys(place, data, lookup)))


def references(
    params: type[BaseModel], data: Any, lookup: Lookup, path: Loc = ()
) -> Iterator[tuple[Loc, type[Artifact], str]]:
    """``(path, artifact wanted, text)`` of everything in ``data`` that stands in a reference's slot."""
    yield from _references(params, data, lookup, path)


def _references(place: Annotation, data: Any, lookup: Lookup, path: Loc) -> Iterator[tuple[Loc, type[Artifact], str]]:
    for option in _options(place):
        if _origin(option) is Ref:
            text = data.get("from") if isinstance(data, dict) else data
            if isinstance(text, str):
                yield path, typing.get_args(option)[0], text
    segments: list[str | int] = []
    if isinstance(data, dict):
        segments = list(data)
    elif isinstance(data, list):
        segments = list(range(len(data)))
    for segment in segments:
        for child in _children(place, data, segment, lookup):
            yield from _references(child, _item(data, segment), lookup, (*path, segment))


def _item(data: Any, segment: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(segment)
    if isinstance(data, list) and isinstance(segment, int) and 0 <= segment < len(data):
        return data[segment]
    return None


def _options(place: Annotation) -> Iterator[Annotation]:
    """The members of a union, without ``Annotated``."""
    place = getattr(place, "__value__", place)  # a ``type X = ...`` statement
    origin = _origin(place)
    if origin is Annotated:
        yield from _options(typing.get_args(place)[0])
    elif origin is Union or origin is types.UnionType:
        for member in typing.get_args(place):
            yield from _options(member)
    else:
        yield place


def _origin(place: Annotation) -> Any:
    return typing.get_origin(place)


def _is_model(place: Annotation) -> bool:
    return isinstance(place, type) and issubclass(place, BaseModel)


def _is_sequence(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Sequence | set | frozenset)


def _model_fields(model: type[BaseModel]) -> dict[str, Annotation]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _component_fields(place: Annotation, data: Any, lookup: Lookup) -> dict[str, Annotation]:
    """``use``, the slot's own keys and the parameters of the component that ``data`` chooses."""
    slot: type[Component[Any]] = _origin(place)
    fields = {"use": str, **_model_fields(slot.slot_fields())}
    name = data.get("use") if isinstance(data, dict) else None
    if isinstance(name, str):
        try:
            found = lookup.find(KIND_OF_PROTOCOL[typing.get_args(place)[0]], name)
        except KdkitError:  # validation has reported it
            return fields
        fields.update(_model_fields(found.spec.params))
    return fields


def _fields(option: Annotation, data: Any, lookup: Lookup) -> dict[str, Annotation] | None:
    """Keys of a mapping with a fixed set of keys, and what each wants; None for anything else."""
    origin = _origin(option)
    if _is_model(option):
        return _model_fields(option)
    if _is_component(option):
        return _component_fields(option, data, lookup)
    if origin is Ref:
        return {"from": str, **_model_fields(ModelOptions)}
    return None


def _single(option: Annotation, data: Any) -> Annotation | None:
    """The item's annotation where one written mapping stands for a list of one, or for a mapping with one entry."""
    origin, args = _origin(option), typing.get_args(option)
    if not isinstance(data, dict) or not isinstance(origin, type) or not args:
        return None
    if _is_sequence(origin):
        return args[0]
    chooses = issubclass(origin, Mapping) and isinstance(data.get("use"), str)
    return args[-1] if chooses and _is_component(args[-1]) else None


def _is_component(place: Annotation) -> bool:
    origin = _origin(place)
    return isinstance(origin, type) and issubclass(origin, Component)


def _keys(place: Annotation, data: Any, lookup: Lookup) -> list[str]:
    keys: list[str] = []
    for option in _options(place):
        fields = _fields(option, data, lookup)
        single = _single(option, data)
        if fields is not None:
            keys += fields
        elif single is not None:
            keys += _keys(single, data, lookup)
    return keys


def _children(place: Annotation, data: Any, segment: str | int, lookup: Lookup) -> Iterator[Annotation]:
    for option in _options(place):
        fields = _fields(option, data, lookup)
        single = _single(option, data)
        if fields is not None:
            if segment in fields:
                yield fields[str(segment)]
        elif single is not None:
            yield from _children(single, data, segment, lookup)
        else:
            yield from _items(option, segment)


def _items(option: Annotation, segment: str | int) -> Iterator[Annotation]:
    """What a list wants at an index, or a mapping of free keys under any key."""
    origin, args = _origin(option), typing.get_args(option)
    if not isinstance(origin, type) or not args:
        return
    if issubclass(origin, Mapping):
        yield args[-1]
    elif _is_sequence(origin) and isinstance(segment, int):
        by_position = origin is tuple and args[-1] is not Ellipsis and segment < len(args)
        yield args[segment] if by_position else args[0]

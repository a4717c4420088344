"""Is a spec that a plugin yields usable? Found out while plugins load, not in the middle of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from kdkit.api.artifacts import Artifact
from kdkit.api.params import Params
from kdkit.api.specs import KINDS, Spec, StageSpec
from kdkit.host.records import PluginFault

__all__ = ["check_spec"]

_RESERVED: Final[Mapping[str, frozenset[str]]] = {
    "stage": frozenset({"kind"}),
    "loss": frozenset({"use", "weight"}),
    "reward": frozenset({"use", "weight"}),
    "dataset": frozenset({"use", "weight"}),
}
"""Keys of a recipe that never reach the component's own parameters."""


def check_spec(item: object, kind: str, hook: str) -> Spec[Any]:
    """``item`` when it is a usable spec of ``kind``.

    Raises:
        PluginFault: It is something else, or its parameters or declarations cannot work.
    """
    wanted = KINDS[kind]
    if not isinstance(item, wanted):
        what = (
            f"{type(item).__name__} {item.name!r}"
            if isinstance(item, Spec)
            else f"a value of type {type(item).__name__}"
        )
        raise PluginFault(f"{hook} yielded {what}; allowed: {wanted.__name__}")
    for problem in (*_declaration_problems(item), *_params_problems(item.params, kind)):
        raise PluginFault(f"{kind} {item.name!r}: {problem}")
    return item


@cache
def _choices(kind: str) -> dict[str, tuple[tuple[object, ...], bool]]:
    """Field name to its allowed literals and whether it holds a set of them."""
    choices: dict[str, tuple[tuple[object, ...], bool]] = {}
    for name, hint in get_type_hints(KINDS[kind]).items():
        if get_origin(hint) is Literal:
            choices[name] = (get_args(hint), False)
        elif get_origin(hint) is frozenset:
            (item,) = get_args(hint)
            choices[name] = (get_args(item), True)
    return choices


def _declaration_problems(spec: Spec[Any]) -> Iterator[str]:
    for name, (allowed, many) in _choices(spec.kind).items():
        value = getattr(spec, name)
        if many and not isinstance(value, frozenset | set):
            yield f"{name} is {value!r}; allowed: a frozenset of {allowed}"
        elif not set(value if many else [value]) <= set(allowed):
            yield f"{name} is {value!r}; allowed: {allowed}"
    for name in {"build", "run"} & {field.name for field in fields(spec)}:
        if not callable(getattr(spec, name)):
            yield f"{name} is not callable"
    if spec.ready is not None and not callable(spec.ready):
        yield "ready is not callable"
    if isinstance(spec.extras, str) or not all(isinstance(extra, str) for extra in spec.extras):
        yield f"extras is {spec.extras!r}; allowed: a tuple of names"
    if isinstance(spec, StageSpec):
        for output, artifact in spec.outputs.items():
            if not (isinstance(artifact, type) and issubclass(artifact, Artifact)):
                yield f"output {output!r} is {artifact!r}; allowed: an artifact type"


def _params_problems(params: type[Params], kind: str) -> Iterator[str]:
    if params.model_config.get("extra") != "forbid":
        yield f"{params.__name__} accepts unknown keys; keep extra='forbid'"
    for key in sorted(_RESERVED.get(kind, frozenset({"use"})) & _keys(params)):
        yield f"{params.__name__} has a field {key!r}, which recipes use for something else"
    if not params.__pydantic_complete__:
        try:
            params.model_rebuild()
        except Exception as exc:  # noqa: BLE001 - pydantic raises whatever evaluating the annotations raises
            yield f"an annotation of {params.__name__} cannot be resolved: {exc}"


def _keys(params: type[Params]) -> set[str]:
    return {field.alias or name for name, field in params.model_fields.items()}

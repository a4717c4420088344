"""``resolved.yaml``: a recipe that stands alone, with overrides applied and paths absolute.

Workers read it, so that editing the recipe during a run changes nothing, and it can be run again as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from pydantic import BaseModel

from kdkit.api.params import iter_fields
from kdkit.api.slots import Component, Ref, walk
from kdkit.engine.inputs import is_local

if TYPE_CHECKING:
    from kdkit.recipe import Recipe

__all__ = ["resolved_data", "to_yaml"]

_NAMES: Final = frozenset({"use", "kind"})
_PLAIN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_WORDS: Final = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
"""Plain text that some YAML reader takes for something else."""


def resolved_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe's data with the plugin files, references and paths that are relative made absolute."""
    texts: set[str] = set()
    for stage in recipe.stages.values():
        texts.update(_references(stage.params))
    paths = {found for stage in recipe.stages.values() for found in _paths(stage.params) if not found[1].is_absolute()}

    def absolute(value: Any, key: str | None = None) -> Any:
        if isinstance(value, Mapping):
            return {name: absolute(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [absolute(item, key) for item in value]
        # Only text that some typed slot took for a path is one, and of parameters only under the key of such a slot:
        # a name beside it may be the same text.
        if isinstance(value, str) and key not in _NAMES and (value in texts or (key, Path(value)) in paths):
            return str((recipe.base_dir / Path(value).expanduser()).absolute())
        return value

    data = dict(recipe.data)
    data["stages"] = absolute(data["stages"])
    if "plugins" in data:
        data["plugins"] = [str((recipe.base_dir / Path(text)).absolute()) for text in data["plugins"]]
    return data


def _references(params: BaseModel) -> Iterator[str]:
    for _, slot in walk(params):
        if isinstance(slot, Ref) and isinstance(slot.source, str) and is_local(slot.source):
            yield slot.source


def _paths(value: Any, key: str | None = None) -> Iterator[tuple[str | None, Path]]:
    """Every path among parameters, with the key that a recipe has it under."""
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, Component):
        yield from _paths(value.params)
    elif isinstance(value, BaseModel):
        for name, item in iter_fields(value):
            yield from _paths(item, type(value).model_fields[name].alias or name)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _paths(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item, key)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that could be read as something else: readers differ, and ``1e-5`` is a number in YAML 1.2."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the signature is PyYAML's
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = _PLAIN.fullmatch(value) is not None and value.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def to_yaml(data: Any) -> str:
    """Plain data as YAML that reads back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

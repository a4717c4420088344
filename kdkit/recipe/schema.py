"""The JSON schema of recipes for editors: completion and documentation of keys as one types.

The schema is wider than the checks of ``kdkit validate``. Components it does not know are accepted with any keys,
because a recipe may bring its own plugin file; references are text, because only the checks know the other stages.
"""

from __future__ import annotations

import copy
import re
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeAlias

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonRef, models_json_schema
from pydantic_core import core_schema

from kdkit.api.artifacts import ARTIFACT_TYPES, Model
from kdkit.api.protocols import KIND_OF_PROTOCOL
from kdkit.api.slots import Component, ModelOptions, OneOrMore, Ref, Scheduled, Weighted
from kdkit.host import Catalog, Entry
from kdkit.recipe.header import FORMAT, NAME_PATTERN, STAGE_PATTERN
from kdkit.recipe.variables import UNTOUCHED

__all__ = ["recipe_schema"]

Schema: TypeAlias = dict[str, Any]

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_VARIABLE: Final = {"$ref": "#/$defs/variable"}
_REFERENCE: Final = "#/$defs/ref-"
_COMPONENTS: Final = ("component-", "weighted-", "scheduled-")
_SLOTS: Final = (_REFERENCE, *(f"#/$defs/{name}" for name in _COMPONENTS))
_ONE_OR_MORE: Final = typing.get_args(OneOrMore)[1]


def recipe_schema(catalog: Catalog) -> Schema:
    """The schema over all components of ``catalog``; deterministic, so that it can be kept in a repository."""
    entries = catalog.entries()
    models = list(dict.fromkeys([entry.spec.params for entry in entries] + [ModelOptions]))
    refs, generated = models_json_schema([(model, "validation") for model in models], schema_generator=_Generator)
    definitions: Schema = generated["$defs"]
    params = {model: _definition(refs[model, "validation"], definitions) for model in models}
    definitions.update(_artifacts(params[ModelOptions]))
    for kind in KIND_OF_PROTOCOL.values():
        of_kind = [entry for entry in entries if entry.kind == kind]
        for slot in (Component, Weighted, Scheduled):
            definitions.update(_choice(slot.__name__.lower(), kind, "use", of_kind, params, slot.slot_fields()))
    stages = [entry for entry in entries if entry.kind == "stage"]
    definitions.update(_choice("stage", "", "kind", stages, params, None))
    definitions["variable"] = {"type": "string", "pattern": r"^\$\{vars\.[A-Za-z_][A-Za-z0-9_-]*\}$"}
    root = _root()
    root["$defs"] = _reachable(root, {name: _with_variables(schema) for name, schema in definitions.items()})
    return root


class _Generator(GenerateJsonSchema):
    """Pydantic's schemas without invented titles, and with what our validators accept besides."""

    # Values that JSON cannot write are left out of the schema, without a word: it is wider than the checks anyway.
    ignored_warning_kinds = frozenset({"skipped-choice", "non-serializable-default"})  # type: ignore[assignment]

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Schema:
        """A type of a plugin that has no JSON schema is accepted as it is."""
        del schema, error_info
        return {}

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Titles that repeat the key are noise in an editor."""
        del schema
        return False

    def encode_default(self, dft: Any) -> Any:
        """References are written as text."""
        return str(dft) if isinstance(dft, Ref) else super().encode_default(dft)

    def get_schema_from_definitions(self, json_ref: JsonRef) -> Schema | None:
        """What the slots refer to is defined after all models: wrapped, so that pydantic does not look inside."""
        if json_ref.startswith(_SLOTS):
            return {"allOf": [{"$ref": json_ref}]}
        return super().get_schema_from_definitions(json_ref)

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> Schema:
        """Where one component may stand for a list of one, or for a mapping with one entry, the schema says so."""
        inner: Schema = super().function_before_schema(schema)
        item = inner.get("items", inner.get("additionalProperties"))
        is_slot = isinstance(item, dict) and any(ref.startswith(_COMPONENTS) for ref in _refs(item.get("allOf")))
        if is_slot or schema["function"]["function"] is _ONE_OR_MORE.func:
            return {"anyOf": [inner, item]}
        return inner


def _definition(ref: Mapping[str, Any], definitions: Schema) -> Schema:
    found: Schema = definitions[ref["$ref"].removeprefix("#/$defs/")]
    return found


def _artifacts(model_options: Schema) -> Schema:
    """The ``ref-TYPE`` definitions that parameter models refer to."""
    schemas: Schema = {}
    for name in ARTIFACT_TYPES:
        text = {"type": "string", "minLength": 1, "description": f"{name}: ${{stages.NAME.OUTPUT}} or a local path"}
        schemas[f"ref-{name}"] = text
    options = copy.deepcopy(model_options)
    source = {"type": "string", "minLength": 1, "description": "Hub id, local path or ${stages.NAME.OUTPUT}"}
    options["properties"] = {"from": source, **options.get("properties", {})}
    options["required"] = ["from", *options.get("required", ())]
    options.pop("title", None)
    schemas[f"ref-{Model.type_name}"] = {"anyOf": [source, options]}
    return schemas


def _choice(
    slot: str,
    kind: str,
    key: str,
    entries: Iterable[Entry],
    params: Mapping[type[BaseModel], Schema],
    slot_fields: type[BaseModel] | None,
) -> Schema:
    """Definitions for one slot: the choice by ``key``, and one for the keys of each component."""
    entries = list(entries)
    title = f"{slot}-{kind}" if kind else slot
    times = Counter(entry.name for entry in entries)
    schemas: Schema = {}
    rules, choices = [], []
    for entry in entries:
        qualified = f"{entry.dist}/{entry.name}"
        names = [entry.name, qualified] if times[entry.name] == 1 else [qualified]
        choices.append({"const": names[0], "description": entry.spec.summary})
        name = f"{title}.{names[0]}"
        schemas[name] = _with_keys(params[entry.spec.params], key, slot_fields)
        condition = {"properties": {key: {"enum": names}}, "required": [key]}
        rules.append({"if": condition, "then": {"$ref": f"#/$defs/{name.replace('~', '~0').replace('/', '~1')}"}})
    any_other = {"type": "string", "description": "a component of another plugin"}
    chosen: Schema = {"type": "object", "required": [key], "properties": {key: {"anyOf": [*choices, any_other]}}}
    schemas[title] = chosen | ({"allOf": rules} if rules else {})
    return schemas


def _with_keys(params: Schema, key: str, slot_fields: type[BaseModel] | None) -> Schema:
    """The schema of parameters with the keys of the slot they are written in."""
    schema = copy.deepcopy(params)
    own = slot_fields.model_json_schema(schema_generator=_Generator).get("properties", {}) if slot_fields else {}
    schema["properties"] = {key: True, **own, **schema.get("properties", {})}
    schema.pop("title", None)
    return schema


def _with_variables(schema: Any) -> Any:
    """The schema with ``${vars.NAME}`` allowed wherever a value stands."""
    if isinstance(schema, list):
        return [_with_variables(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = _unwrapped(schema)
    out: Schema = {}
    for key, value in schema.items():
        if key in {"properties", "$defs"}:
            out[key] = {name: _or_variable(_with_variables(item)) for name, item in value.items()}
        elif key in {"items", "additionalProperties"} and isinstance(value, dict):
            out[key] = _or_variable(_with_variables(value))
        elif key == "prefixItems":
            out[key] = [_or_variable(_with_variables(item)) for item in value]
        elif key in {"anyOf", "oneOf", "allOf", "then", "else"}:
            out[key] = _with_variables(value)
        else:
            out[key] = value
    return out


def _unwrapped(schema: Schema) -> Schema:
    """``{allOf: [{$ref}]}`` as a plain ``$ref``."""
    wrapped = schema.get("allOf", ())
    if len(wrapped) != 1 or set(wrapped[0]) != {"$ref"}:
        return schema
    return {**wrapped[0], **{key: value for key, value in schema.items() if key != "allOf"}}


def _or_variable(schema: Any) -> Any:
    if not isinstance(schema, dict) or _takes_any_text(schema):
        return schema
    outer = {key: schema[key] for key in ("description", "default") if key in schema}
    core = {key: value for key, value in schema.items() if key not in outer}
    branches = core["anyOf"] if set(core) == {"anyOf"} else [core]
    return {**outer, "anyOf": [*branches, _VARIABLE]}


def _takes_any_text(schema: Schema) -> bool:
    if str(schema.get("$ref", "")).startswith(_REFERENCE):
        return True
    if any(_takes_any_text(branch) for branch in schema.get("anyOf", ())):
        return True
    narrow = {"enum", "const", "pattern", "format", "minLength", "maxLength"}
    return schema.get("type") == "string" and (not narrow & set(schema) or schema.get("minLength") == 1)


def _root() -> Schema:
    text_list = {"type": "array", "items": {"type": "string", "minLength": 1}}
    trackers = {"type": "array", "items": {"$ref": "#/$defs/component-tracker"}}
    strict = {"$ref": "#/$defs/stage"}
    properties: Schema = {
        "kdkit": {"const": FORMAT, "description": "The recipe format."},
        "name": {"type": "string", "pattern": f"^{NAME_PATTERN}$", "description": "Directory of the recipe's runs."},
        "seed": {"type": "integer", "minimum": 0, "default": 17, "description": "Every random stream derives from it."},
        "extends": {"type": "string", "minLength": 1, "description": "A recipe file that this one changes."},
        "vars": {"type": "object", "description": "Values used as ${vars.NAME}; set with --var NAME=VALUE."},
        "requires": text_list | {"description": "Plugin distributions and versions, such as kdkit-acme>=0.2."},
        "plugins": text_list | {"description": "Plugin files, such as ./losses.py."},
        "stages": _stages(strict) | {"description": "What to do. Stages run in the order of their references."},
        "track": {"anyOf": [trackers, trackers["items"]], "description": "Where metrics go."},
    }
    merged = {"properties": {"stages": _stages({"anyOf": [strict, {"type": "object"}]})}}
    properties["stages"] = {"description": properties["stages"]["description"], "type": "object"}
    return {
        "$schema": _DIALECT,
        "title": "kdkit recipe",
        "type": "object",
        "properties": {
            key: value if key in UNTOUCHED else _or_variable(_with_variables(value))
            for key, value in properties.items()
        },
        "additionalProperties": False,
        # What a recipe changes need not be complete: the rest is in the recipe that it extends.
        "if": {"required": ["extends"]},
        "then": _with_variables(merged),
        "else": {
            "required": ["kdkit", "name", "stages"],
            **_with_variables({"properties": {"stages": _stages(strict) | {"minProperties": 1}}}),
        },
    }


def _stages(stage: Schema) -> Schema:
    return {"type": "object", "propertyNames": {"pattern": f"^{STAGE_PATTERN}$"}, "additionalProperties": stage}


def _reachable(root: Schema, definitions: Schema) -> Schema:
    """The definitions that ``root`` leads to, sorted by name."""
    found: set[str] = set()
    pending = list(_refs(root))
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += _refs(definitions[name])
    return {name: definitions[name] for name in sorted(found)}


def _refs(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for item in schema:
            yield from _refs(item)
    elif isinstance(schema, dict):
        ref = schema.get("$ref")
        if isinstance(ref, str):
            yield re.sub("~1", "/", ref.removeprefix("#/$defs/")).replace("~0", "~")
        for value in schema.values():
            yield from _refs(value)

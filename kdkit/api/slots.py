"""Typed slots for parameters: components that a recipe names, and references between stages.

``Component[Loss]`` is a choice ``{use: forward-kl, temperature: 2.0}`` that is looked up in the catalogue and validated
against that component's own parameters while the enclosing parameters are validated. ``Ref[Model]`` is a Hub id, a
local path or ``${stages.NAME.OUTPUT}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, Protocol, TypeAlias, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from kdkit.api.artifacts import Artifact, KeepLayers, Model
from kdkit.api.errors import KdkitError, PluginError
from kdkit.api.params import Params, iter_fields
from kdkit.api.protocols import KIND_OF_PROTOCOL

if TYPE_CHECKING:
    from kdkit.api.specs import Spec

__all__ = ["Component", "Found", "Lookup", "OneOrMore", "Ref", "Scheduled", "StageOutput", "Weighted", "walk"]

T_co = TypeVar("T_co", covariant=True)
A = TypeVar("A", bound=Artifact)
P = TypeVar("P", bound=Params)

LOOKUP: Final = "kdkit-lookup"
"""Key of the validation context under which the catalogue travels."""
_STAGE_REF: Final = re.compile(r"\$\{stages\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\}")


@dataclass(frozen=True, slots=True)
class Found:
    """A component found in the catalogue.

    ``identity`` changes whenever the code behind the name may produce something else: the cache version of a built-in,
    also distribution and version of a third-party component, or the hash of a plugin file.
    """

    spec: Spec[Any]
    qualified_name: str
    identity: str
    source: str


class Lookup(Protocol):
    """What validation needs of a catalogue."""

    def find(self, kind: str, name: str, /) -> Found:
        """The component of ``kind`` called ``name``; raises ``PluginError`` or ``RecipeError`` with a suggestion."""


class Component(Generic[T_co]):
    """A component chosen by name, with validated parameters. Build it with ``ctx.build(component)``."""

    __slots__ = ("extra", "found", "kind", "params")

    def __init__(self, kind: str, found: Found, params: Params, extra: Mapping[str, Any] | None = None) -> None:
        self.kind = kind
        self.found = found
        self.params = params
        self.extra = dict(extra or {})

    @property
    def name(self) -> str:
        """The short name of the component."""
        return self.found.spec.name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind} {self.found.qualified_name}, {self.params!r})"

    @classmethod
    def slot_fields(cls) -> type[Params]:
        """Keys that belong to the slot and not to the component (``weight``)."""
        return Params

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        del handler
        (protocol,) = get_args(source)
        kind = KIND_OF_PROTOCOL[protocol]

        def validate(value: Any, info: core_schema.ValidationInfo) -> Component[Any]:
            if isinstance(value, Component):
                return value
            return cls._from_mapping(kind, value, info.context or {})

        return core_schema.with_info_plain_validator_function(
            validate,
            metadata={"kdkit_kind": kind},
            serialization=core_schema.plain_serializer_function_ser_schema(repr),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        del handler
        kind = schema["metadata"]["kdkit_kind"]
        return {"$ref": f"#/$defs/{cls.__name__.lower()}-{kind}"}

    @classmethod
    def _from_mapping(cls, kind: str, value: Any, context: Mapping[str, Any]) -> Component[Any]:
        if not isinstance(value, dict) or not isinstance(value.get("use"), str):
            raise PydanticCustomError(
                "component",
                "a {kind} is a mapping with its name under 'use', such as {example}",
                {"kind": kind, "example": "{use: NAME}"},
            )
        if LOOKUP not in context:
            raise PydanticCustomError("component", "no catalogue in the validation context")
        found = _find(context[LOOKUP], kind, value["use"])
        own = cls.slot_fields()
        extra, extra_errors = _validated(own, {k: v for k, v in value.items() if k in own.model_fields}, {})
        rest = {k: v for k, v in value.items() if k != "use" and k not in own.model_fields}
        with _Validators(found):
            params, param_errors = _validated(found.spec.params, rest, context)
        if extra is None or params is None:
            raise ValidationError.from_exception_data(found.qualified_name, [*extra_errors, *param_errors])
        return cls(kind, found, params, dict(iter_fields(extra)))


class _Validators:
    """Around the validators of a component, which are a plugin's code: a complaint about a value is a ValidationError,
    anything else they raise is the plugin's fault and names it.
    """

    def __init__(self, found: Found) -> None:
        self._found = found

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, KdkitError | ValidationError):
            found = self._found
            where = f"{found.spec.kind} {found.qualified_name!r} ({found.source})"
            raise PluginError(f"its parameters raise {type(error).__name__}: {error}", where=where) from error


def _find(lookup: Lookup, kind: str, name: str) -> Found:
    try:
        return lookup.find(kind, name)
    except KdkitError as error:
        code = {"message": str(error), "exit_code": int(error.exit_code)}
        problem = PydanticCustomError("component", "{message}", code)
        detail = InitErrorDetails(type=problem, loc=("use",), input=name)
        raise ValidationError.from_exception_data(kind, [detail]) from None


def _validated(
    model: type[P], data: Mapping[str, Any], context: Mapping[str, Any]
) -> tuple[P | None, list[InitErrorDetails]]:
    """The validated model, or None with its errors, so that errors of several models can be reported together."""
    try:
        return model.model_validate_json(json.dumps(data), context=dict(context)), []
    except ValidationError as error:
        return None, [
            InitErrorDetails(
                type=PydanticCustomError(item["type"], "{message}", {**item.get("ctx", {}), "message": item["msg"]}),
                loc=item["loc"],
                input=item["input"],
            )
            for item in error.errors(include_url=False)
        ]


class _Weight(Params):
    weight: float = Field(1.0, gt=0)
    """Weight of this entry relative to the others in its list."""


class Weighted(Component[T_co]):
    """A component in a weighted list: losses, rewards, data mixtures."""

    __slots__ = ()

    @classmethod
    def slot_fields(cls) -> type[Params]:
        return _Weight

    @property
    def weight(self) -> float:
        """The weight; 1 when the recipe gives none."""
        return float(self.extra.get("weight", 1.0))


class _Schedule(_Weight):
    from_step: int = Field(0, ge=0)
    """The first optimiser step, counted from 0, in which this entry counts."""


class Scheduled(Weighted[T_co]):
    """A component in a weighted list whose entries may join later: rewards."""

    __slots__ = ()

    @classmethod
    def slot_fields(cls) -> type[Params]:
        return _Schedule

    @property
    def from_step(self) -> int:
        """The first step in which it counts; 0 when the recipe gives none."""
        return int(self.extra.get("from_step", 0))


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


OneOrMore: TypeAlias = Annotated[list[T_co], BeforeValidator(_as_list), Field(min_length=1)]
"""A list, or one mapping that stands for a list of one."""


@dataclass(frozen=True, slots=True)
class StageOutput:
    """``${stages.STAGE.OUTPUT}``."""

    stage: str
    output: str

    def __str__(self) -> str:
        return f"${{stages.{self.stage}.{self.output}}}"


class ModelOptions(Params):
    """The mapping form of a model: ``{from: ORG/NAME, keep_layers: 20}``."""

    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    keep_layers: KeepLayers | None = None
    """Depth-pruned copy: a count, ``every-2nd``, or explicit layer indices from 0."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


class Ref(Generic[A]):
    """A typed input: a stage's output, a Hub id, or a local path.

    Attributes:
        artifact: The artifact type the slot wants.
        source: A :class:`StageOutput`, or the literal text from the recipe.
        options: For models, the mapping form's other keys.
    """

    __slots__ = ("artifact", "options", "source")

    def __init__(self, artifact: type[A], source: StageOutput | str, options: ModelOptions | None = None) -> None:
        self.artifact = artifact
        self.source = source
        self.options = options or ModelOptions()

    def __str__(self) -> str:
        return str(self.source)

    def __repr__(self) -> str:
        return f"Ref({self.artifact.type_name}, {self.source!s})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        del handler
        (artifact,) = get_args(source)

        def validate(value: Any) -> Ref[Any]:
            return value if isinstance(value, Ref) else cls._parse(artifact, value)

        return core_schema.no_info_plain_validator_function(
            validate,
            metadata={"kdkit_artifact": artifact.type_name},
            serialization=core_schema.plain_serializer_function_ser_schema(str),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        del handler
        return {"$ref": f"#/$defs/ref-{schema['metadata']['kdkit_artifact']}"}

    @classmethod
    def _parse(cls, artifact: type[A], value: Any) -> Ref[A]:
        options = ModelOptions()
        if isinstance(value, dict) and artifact is Model and isinstance(value.get("from"), str):
            rest = {k: v for k, v in value.items() if k != "from"}
            options = ModelOptions.model_validate_json(json.dumps(rest))
            value = value["from"]
        if not isinstance(value, str) or not value:
            forms = "a Hub id, a local path (./ ../ / ~) or ${stages.NAME.OUTPUT}"
            also = ", or {from: ..., keep_layers: ...}" if artifact is Model else ""
            raise PydanticCustomError("ref", "{what} is {forms}", {"what": artifact.type_name, "forms": forms + also})
        if match := _STAGE_REF.fullmatch(value):
            return cls(artifact, StageOutput(*match.groups()), options)
        if "${" in value:
            raise PydanticCustomError("ref", "a reference is a whole value of the form ${stages.NAME.OUTPUT}")
        return cls(artifact, value, options)


Slot: TypeAlias = Component[Any] | Ref[Any]


def walk(value: Any, loc: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Slot]]:
    """Every component and reference in ``value``, nested ones included, with its location."""
    if isinstance(value, Ref):
        yield loc, value
    elif isinstance(value, Component):
        yield loc, value
        yield from walk(value.params, loc)
    elif isinstance(value, BaseModel):
        for name, item in iter_fields(value):
            yield from walk(item, (*loc, name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, (*loc, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from walk(item, (*loc, index))

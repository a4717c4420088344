"""The base of every component's parameters, and the markers that keep a field out of the content key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdkit.api.field_docs import field_docs

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

__all__ = ["Params", "Precision", "Runtime", "Sampling", "is_runtime"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """Marks a field that changes how fast or how chatty a stage is, never what it produces.

    Example: ``logging_steps: Annotated[int, Runtime()] = 10``. Such fields stay out of the content key.
    """


@dataclass(frozen=True, slots=True)
class ByHardware:
    """Marks a field whose value ``"auto"`` is resolved from the machine; the resolved value enters the key."""


Precision: TypeAlias = Annotated[Literal["auto", "bf16", "fp32"], ByHardware()]
"""Compute precision of matrix products: ``auto`` is bf16 where the hardware multiplies it faster, else fp32."""


class Params(BaseModel):
    """Parameters of one component: unknown keys rejected, no silent type casts, immutable.

    Document every field with a string below it: the text appears in ``kdkit plugins show`` and in the docs.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, text in field_docs(cls).items():
            field = cls.__pydantic_fields__.get(name)
            if field is not None and field.description is None:
                field.description = text

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, field in cls.__pydantic_fields__.items():
            if field.description and (field.alias or name) in properties:
                properties[field.alias or name].setdefault("description", field.description)
        return schema


class Sampling(Params):
    """How completions are decoded. Names are those of ``transformers.GenerationConfig``."""

    do_sample: bool = False
    """Sample from the model; false is greedy decoding."""
    temperature: float = Field(1.0, gt=0)
    """Softmax temperature when sampling."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: the smallest set of tokens with this much probability; 1 keeps all."""
    top_k: int = Field(0, ge=0)
    """Keep only the k most probable tokens; 0 keeps all."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest completion, in tokens; a longer one is cut and counted as truncated."""

    @model_validator(mode="after")
    def _sampling_is_on(self) -> Sampling:
        if not self.do_sample and (self.temperature, self.top_p, self.top_k) != (1.0, 1.0, 0):
            raise ValueError("temperature, top_p and top_k need do_sample: true")
        return self


def is_runtime(model: type[BaseModel], field: str) -> bool:
    """Whether ``field`` of ``model`` is marked :class:`Runtime`."""
    return any(isinstance(mark, Runtime) for mark in model.model_fields[field].metadata)


def iter_fields(params: BaseModel) -> Iterator[tuple[str, Any]]:
    """``(name, value)`` of every declared field, in declaration order."""
    for name in type(params).model_fields:
        yield name, getattr(params, name)

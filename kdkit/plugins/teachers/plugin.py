"""Built-in teachers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from kdkit.api import Model, Params, Precision, Ref, Runtime, SignalCache, TeacherSpec, hookimpl

if TYPE_CHECKING:
    from kdkit.api import BuildContext, Teacher

_VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")


class LocalTeacherParams(Params):
    """A model in this process: a Hub id, a directory, or a stage's output."""

    model: Ref[Model]
    """The teacher."""
    precision: Precision = "auto"
    """Weights and matrix products in bf16 or fp32."""
    batch_size: int = Field(32, ge=1)
    """Prompts decoded together when it writes answers; in bf16 the rounding, and so an answer, can depend on it."""


def _local(params: LocalTeacherParams, ctx: BuildContext) -> Teacher:
    from kdkit.plugins.teachers.local import LocalTeacher

    return LocalTeacher(params, ctx)


class OpenAITeacherParams(Params):
    """A model behind a server with the OpenAI protocol: vLLM, kdkit serve-teacher, a hosted provider."""

    base_url: str
    """Where the protocol starts, such as http://127.0.0.1:8000/v1."""
    model: str = Field(min_length=1, max_length=512)
    """The model's name on the server."""
    tokenizer: Ref[Model] | None = None
    """A model with the teacher's tokenizer, such as the student; log-probabilities need it, answers do not."""
    top_k: Annotated[int, Field(ge=1, le=512)] | Literal["auto"] = "auto"
    """Log-probabilities per token; auto takes as many as the server gives, 128 at most."""
    api_key_env: Annotated[str | None, Runtime()] = None
    """Name of the environment variable that holds the key; the key itself must not stand in a recipe."""
    timeout: Annotated[float, Runtime(), Field(gt=0, le=86400)] = 120.0
    """Seconds that one request may take."""
    max_retries: Annotated[int, Runtime(), Field(ge=0, le=100)] = 6
    """Further attempts when there is no connection, no answer in time, HTTP 429 or 5xx."""
    concurrency: Annotated[int, Runtime(), Field(ge=1, le=256)] = 8
    """Requests under way at the same time."""

    @field_validator("base_url")
    @classmethod
    def _only_an_address(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            known = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            known = False
        if not known or not value.isascii() or not value.isprintable() or " " in value:
            raise ValueError("is an address such as http://127.0.0.1:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("has a user name or a query; a key belongs into the variable that api_key_env names")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _only_a_name(cls, value: str | None) -> str | None:
        if value is not None and not _VARIABLE.fullmatch(value):
            raise ValueError("is the name of an environment variable in capitals, such as OPENAI_API_KEY, not the key")
        return value


def _openai(params: OpenAITeacherParams, ctx: BuildContext) -> Teacher:
    from kdkit.plugins.teachers.openai import OpenAITeacher

    return OpenAITeacher(params, ctx)


class CacheTeacherParams(Params):
    """What a teacher said about the rows, from disk: training needs no teacher in memory."""

    cache: Ref[SignalCache]
    """Output of a cache-teacher stage. Losses take its temperature, and rows must be the very same tokens."""
    model: Ref[Model] | None = None
    """Refuse a cache that was not taken from this model."""


def _cache(params: CacheTeacherParams, ctx: BuildContext) -> Teacher:
    from kdkit.plugins.teachers.cache import CacheTeacher

    return CacheTeacher(params, ctx)


@hookimpl
def kdkit_teachers() -> Iterator[TeacherSpec[Any]]:
    """The teachers."""
    yield TeacherSpec(
        name="local",
        summary="A Hugging Face model in this process: full logits, hidden states and text",
        params=LocalTeacherParams,
        build=_local,
        gives=frozenset({"logits", "text", "hidden"}),
    )
    yield TeacherSpec(
        name="openai",
        summary="A server with the OpenAI protocol: text, and top-k log-probabilities",
        params=OpenAITeacherParams,
        build=_openai,
        gives=frozenset({"topk", "text"}),
        extras=("openai",),
    )
    yield TeacherSpec(
        name="cache",
        summary="What a cache-teacher stage wrote to disk: top-k with a tail, no model in memory",
        params=CacheTeacherParams,
        build=_cache,
        gives=frozenset({"topk"}),
        fixed_rows=True,
    )

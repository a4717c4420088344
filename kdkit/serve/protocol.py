"""The requests that the server understands, checked; a field that asks for what it lacks is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdkit.api.params import Sampling
from kdkit.serve.limits import Limits, Refusal

__all__ = ["ChatRequest", "CompletionRequest", "parse"]

_HARMLESS: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stop": ([], ""),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "allowed_token_ids": (),
    "guided_json": (),
    "guided_regex": (),
}
"""Fields of the protocol that this server lacks, with the values that mean the same as leaving them out."""

_COLDEST: Final = 1e-5
"""Temperatures below this one mean greedy decoding: logits divided by them would be infinite."""

R = TypeVar("R", bound="_Request")


class _Request(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    model: str
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=0, lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _nothing_unknown(cls, value: Any) -> Any:
        for name, allowed in _HARMLESS.items():
            given = value.get(name) if isinstance(value, dict) else None
            if given is not None and given not in allowed:
                raise ValueError(f"'{name}' is not supported by this server; leave it out")
        return value

    def sampling(self, new_tokens: int) -> Sampling:
        """Decoding as the protocol means it: temperature 1 unless told otherwise, (nearly) 0 is greedy."""
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature < _COLDEST:
            return Sampling(max_new_tokens=new_tokens)
        top_k = self.top_k if self.top_k is not None and self.top_k > 0 else 0
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=new_tokens)


def _whole(text: str) -> str:
    """The text. JSON can have halves of characters, which no tokenizer takes: ``ValueError`` then."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("is not valid Unicode text") from error
    return text


class ChatMessage(BaseModel):
    """One turn; the content is text."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[str, AfterValidator(_whole)]


class ChatRequest(_Request):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None


_Ids = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(_Request):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[int] | list[str] | list[_Ids]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(None, ge=0)
    return_tokens_as_token_ids: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        given: Any = self.prompt
        several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
        return list(given) if several else [given]

    def check(self, limits: Limits) -> None:
        """Refuse what is outside the limits, before anything is computed. Raises ``Refusal``."""
        prompts = self.prompts
        if len(prompts) > limits.prompts:
            raise Refusal(400, f"{len(prompts)} prompts in one request; at most {limits.prompts} are allowed")
        if any(len(prompt) == 0 for prompt in prompts):
            raise Refusal(400, "a prompt is empty")
        try:
            "".join(prompt for prompt in prompts if isinstance(prompt, str)).encode()
        except UnicodeEncodeError as error:
            raise Refusal(400, "a prompt is not valid Unicode text") from error
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > limits.top_k:
                raise Refusal(400, f"{name} is {getattr(self, name)}; at most {limits.top_k} are allowed")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise Refusal(400, "max_tokens is 0 and neither echo nor prompt_logprobs is set: nothing is asked")


def parse(kind: type[R], body: bytes) -> R:
    """The request in ``body``. Raises ``Refusal`` with the first thing that is wrong with it."""
    try:
        value = json.loads(body)
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise Refusal(400, f"{place}: {message}" if place else message) from error
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is no JSON") from error

"""The routes: who may ask, how much, and what is answered."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from kdkit.api.data import Completion, Message
from kdkit.api.errors import KdkitError
from kdkit.api.params import Sampling
from kdkit.serve.batcher import AnswerJob, Batcher, ScoreJob
from kdkit.serve.limits import MOST_ENTRIES, Limits, Refusal
from kdkit.serve.model import Scored, ServedModel
from kdkit.serve.protocol import ChatRequest, CompletionRequest, parse
from kdkit.serve.replies import Maker, Piece, chat_reply, completion_reply, echo_logprobs, error_reply, prompt_logprobs

__all__ = ["TeacherApi"]

_GONE_SECONDS: Final = 1.0
"""How often a waiting request looks whether its client is still there."""
_NOTHING: Final = Completion("", (), truncated=True)


class TeacherApi:
    """The application.

    Args:
        model: What answers; text is turned into ids here, everything else is for ``batcher``.
        batcher: Computes.
        name: The model's name for clients.
        key: What clients have to send as a bearer token; None lets everyone in.
        limits: What they may ask.
    """

    def __init__(self, model: ServedModel, batcher: Batcher, *, name: str, key: str | None, limits: Limits) -> None:
        self._model = model
        self._batcher = batcher
        self._name = name
        self._maker = Maker(name, f"fp_{model.fingerprint[:16]}")
        self._key = key.encode() if key is not None else None
        self._limits = limits
        self._active = 0
        self._texts: dict[int, str] = {}
        self._longest = min(limits.prompt_tokens, model.context or limits.prompt_tokens)

    def app(self) -> FastAPI:
        """The application with its routes; no page of it loads anything from elsewhere."""
        app = FastAPI(title="kdkit serve-teacher", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/health", self._health, methods=["GET"], response_class=Response)
        app.add_api_route("/v1/models", self._models, methods=["GET"], response_class=Response)
        app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"], response_class=Response)
        app.add_api_route("/v1/completions", self._complete, methods=["POST"], response_class=Response)
        return app

    async def _health(self) -> Response:
        return Response(status_code=200)

    async def _models(self, request: Request) -> Response:
        return await self._guarded(request, self._list)

    async def _chat(self, request: Request) -> Response:
        return await self._guarded(request, self._answer_messages)

    async def _complete(self, request: Request) -> Response:
        return await self._guarded(request, self._answer_prompts)

    async def _guarded(self, request: Request, work: Callable[[Request], Awaitable[Any]]) -> Response:
        """What ``work`` gives as JSON, for a client with the key when there is room; else the error."""
        try:
            self._authorize(request)
            if self._active >= self._limits.requests:
                raise Refusal(429, f"{self._active} requests are under way; come again")
            self._active += 1
            try:
                value = await work(request)
                body = await asyncio.to_thread(_dumped, value)
            finally:
                self._active -= 1
        except Refusal as refusal:
            headers = {"Retry-After": "1"} if refusal.status in {429, 503} else {}
            headers |= {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
            error = json.dumps(error_reply(refusal.status, refusal.message))
            return Response(error, refusal.status, headers, media_type="application/json")
        except ClientDisconnect:
            return Response(status_code=499)
        except asyncio.CancelledError:
            # Only the end of the server cancels a request; there is nothing after it that could need to know.
            return Response(json.dumps(error_reply(503, "the server is stopping")), 503, media_type="application/json")
        return Response(body, media_type="application/json")

    def _authorize(self, request: Request) -> None:
        if self._key is None:
            return
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        # Both always compared as bytes of any length, in a time that does not tell how much is right.
        if not (hmac.compare_digest(given.strip().encode(), self._key) and kind.lower() == "bearer"):
            raise Refusal(401, "the key is missing or wrong")

    async def _body(self, request: Request) -> bytes:
        """The body of a request. Pages of other sites cannot send this content type unasked."""
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the body has to be application/json")
        data = bytearray()
        most = self._limits.body_bytes
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        raise Refusal(413, f"the body is larger than {most:,} bytes")
        except TimeoutError as error:
            raise Refusal(408, "the body came too slowly") from error
        return bytes(data)

    async def _list(self, _request: Request) -> dict[str, Any]:
        vocabulary = self._model.vocabulary
        entry = {
            "id": self._name,
            "object": "model",
            "created": 0,
            "owned_by": "kdkit",
            "fingerprint": self._model.fingerprint,
            "max_model_len": self._longest,
            "max_logprobs": min(self._limits.top_k, vocabulary.size),
            "vocabulary": {
                "fingerprint": vocabulary.fingerprint,
                "tokens": vocabulary.tokens,
                "size": vocabulary.size,
            },
        }
        return {"object": "list", "data": [entry]}

    async def _answer_messages(self, request: Request) -> dict[str, Any]:
        asked = parse(ChatRequest, await self._body(request))
        self._check_name(asked.model)
        messages = [Message(message.role, message.content) for message in asked.messages]
        ids = await asyncio.to_thread(_client_error, lambda: self._known(self._model.chat_ids(messages)))
        most = asked.max_completion_tokens or asked.max_tokens
        new = min(self._limits.new_tokens, self._longest - len(ids)) if most is None else most
        self._check_room(len(ids), max(new, 1))
        (completion,) = await self._completions(request, [ids], asked.sampling(new), asked.seed)
        return chat_reply(self._maker, Piece(ids, completion))

    async def _answer_prompts(self, request: Request) -> Callable[[], dict[str, Any]]:
        asked = parse(CompletionRequest, await self._body(request))
        self._check_name(asked.model)
        asked.check(self._limits)
        prompts = await asyncio.to_thread(_client_error, lambda: [self._ids(prompt) for prompt in asked.prompts])
        new = 16 if asked.max_tokens is None else asked.max_tokens
        for prompt in prompts:
            self._check_room(len(prompt), new)
        wanted = max(asked.logprobs or 0, asked.prompt_logprobs or 0)
        entries = sum(len(prompt) + new for prompt in prompts) * (wanted + 1)
        if entries > MOST_ENTRIES:
            raise Refusal(400, f"{entries:,} log-probabilities in one request; at most {MOST_ENTRIES:,} are allowed")
        completions = [_NOTHING] * len(prompts)
        if new:
            completions = await self._completions(request, prompts, asked.sampling(new), asked.seed)
        pieces = [Piece(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]
        if asked.logprobs is not None or asked.prompt_logprobs is not None:
            pieces = await self._scored(request, pieces, wanted)
        return lambda: completion_reply(self._maker, pieces, [self._choice(piece, asked) for piece in pieces])

    def _choice(self, piece: Piece, asked: CompletionRequest) -> dict[str, Any]:
        shown = self._text(piece.prompt) if asked.echo else ""
        choice: dict[str, Any] = {"text": shown + piece.completion.text, "logprobs": None, "prompt_logprobs": None}
        by_id = bool(asked.return_tokens_as_token_ids)
        if asked.logprobs is not None:
            named = "token_id:{}".format if by_id else self._token_text
            choice["logprobs"] = echo_logprobs(piece, asked.logprobs, named, echo=asked.echo)
        if asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                piece, asked.prompt_logprobs, None if by_id else self._token_text
            )
        return choice

    def _text(self, ids: Sequence[int]) -> str:
        return self._model.text(ids, special=True)

    def _token_text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._text([token])
        return self._texts[token]

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise Refusal(404, f"the model {name[:100]!r} does not exist; there is {self._name!r}")

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self._known(self._model.text_ids(prompt) if isinstance(prompt, str) else prompt)

    def _known(self, ids: list[int]) -> list[int]:
        """The ids, all of them the model's: a tokenizer may have tokens that were added after the model was made."""
        size = self._model.vocabulary.size
        if min(ids) < 0 or max(ids) >= size:
            raise Refusal(400, f"a token id is outside the vocabulary, 0 to {size - 1}")
        return ids

    def _check_room(self, tokens: int, new: int) -> None:
        if new > self._limits.new_tokens:
            raise Refusal(400, f"max_tokens is {new}; at most {self._limits.new_tokens} are allowed")
        if tokens + new > self._longest:
            raise Refusal(400, f"{tokens} tokens and {new} new ones; prompt and answer may have {self._longest}")

    async def _completions(
        self, request: Request, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int | None
    ) -> list[Completion]:
        first = secrets.randbelow(2**63) if seed is None else seed
        jobs = [AnswerJob(tuple(ids), sampling, (first + index) % 2**63) for index, ids in enumerate(prompts)]
        return await self._results(request, jobs)

    async def _scored(self, request: Request, pieces: Sequence[Piece], k: int) -> list[Piece]:
        jobs = [ScoreJob((*piece.prompt, *piece.completion.token_ids), k) for piece in pieces]
        scores: list[Scored] = await self._results(request, jobs)
        return [Piece(piece.prompt, piece.completion, score) for piece, score in zip(pieces, scores, strict=True)]

    async def _results(self, request: Request, jobs: Sequence[ScoreJob | AnswerJob]) -> list[Any]:
        """The jobs' results; jobs that have not begun are dropped when the client leaves."""
        self._batcher.submit(jobs)
        waiting = asyncio.gather(*(asyncio.wrap_future(job.result) for job in jobs))
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=_GONE_SECONDS)
            if not waiting.done() and await request.is_disconnected():
                waiting.cancel()
                # Awaited, or asyncio would report it as lost.
                with contextlib.suppress(asyncio.CancelledError):
                    await waiting
                raise ClientDisconnect
        if waiting.cancelled():
            raise Refusal(503, "the server is stopping")
        try:
            return list(waiting.result())
        except KdkitError as error:
            raise Refusal(500, f"the model failed: {error}") from error


def _client_error(work: Callable[[], Any]) -> Any:
    """What ``work`` gives; what is wrong with a prompt is the client's to know."""
    try:
        return work()
    except KdkitError as error:
        raise Refusal(400, error.what) from error


def _dumped(value: Any) -> bytes:
    try:
        return json.dumps(value() if callable(value) else value, allow_nan=False).encode()
    except ValueError as error:
        raise Refusal(500, "the model's log-probabilities are not finite") from error

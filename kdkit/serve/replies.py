"""Answers in the shapes of the protocol."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdkit.api import Completion
    from kdkit.serve.model import Scored

__all__ = ["Maker", "Piece", "chat_reply", "completion_reply", "echo_logprobs", "error_reply", "prompt_logprobs"]


@dataclass(frozen=True, slots=True)
class Maker:
    """Who answers: the model's name, and a fingerprint of its weights and their precision."""

    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Piece:
    """One prompt with what came of it: ``prompt`` are its token ids, ``scored`` covers prompt and completion."""

    prompt: Sequence[int]
    completion: Completion
    scored: Scored | None = None


def error_reply(status: int, message: str) -> dict[str, Any]:
    """The body of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def chat_reply(maker: Maker, piece: Piece) -> dict[str, Any]:
    """Body of an answer to messages."""
    message = {"role": "assistant", "content": piece.completion.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(piece)}
    return {**_head("chatcmpl", "chat.completion", maker), "choices": [choice], "usage": _usage([piece])}


def completion_reply(maker: Maker, pieces: Sequence[Piece], choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Body of an answer to raw prompts; ``choices`` have text and log-probabilities."""
    numbered = [
        {"index": index, "finish_reason": _reason(piece), **choice}
        for index, (piece, choice) in enumerate(zip(pieces, choices, strict=True))
    ]
    return {**_head("cmpl", "text_completion", maker), "choices": numbered, "usage": _usage(pieces)}


def _head(prefix: str, kind: str, maker: Maker) -> dict[str, Any]:
    made = {"model": maker.model, "system_fingerprint": maker.fingerprint}
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), **made}


def _reason(piece: Piece) -> str:
    return "length" if piece.completion.truncated else "stop"


def _usage(pieces: Sequence[Piece]) -> dict[str, int]:
    read = sum(len(piece.prompt) for piece in pieces)
    written = sum(len(piece.completion.token_ids) for piece in pieces)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def prompt_logprobs(piece: Piece, k: int, decoded: Callable[[int], str] | None) -> list[dict[str, Any] | None]:
    """The log-probabilities of a prompt as vLLM gives them.

    Args:
        piece: With its scores.
        k: Entries per token; the token itself is added where it is not among them.
        decoded: The text of a token; None leaves texts out.
    """
    assert piece.scored is not None
    rows: list[dict[str, Any] | None] = [None]
    for token, top, own, rank in _positions(piece, piece.prompt, 0, k):
        entries = {str(name): {"logprob": value, "rank": place} for place, (name, value) in enumerate(top, 1)}
        entries.setdefault(str(token), {"logprob": own, "rank": rank})
        if decoded is not None:
            for name, entry in entries.items():
                entry["decoded_token"] = decoded(int(name))
        rows.append(entries)
    return rows


def echo_logprobs(piece: Piece, k: int, named: Callable[[int], str], *, echo: bool) -> dict[str, Any]:
    """The log-probabilities of prompt and completion (the completion alone without ``echo``) in the older shape.

    Args:
        piece: With its scores.
        k: Entries per token.
        named: How a token is written.
        echo: Whether the prompt is part of the answer.
    """
    skipped = 0 if echo else len(piece.prompt)
    sequence = [*piece.prompt, *piece.completion.token_ids]
    tokens = [named(token) for token in sequence[skipped:]]
    offsets, offset = [], 0
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    own: list[float | None] = [None] if echo else []
    tops: list[dict[str, float] | None] = [None] if echo else []
    for token, top, value, _ in _positions(piece, sequence, max(0, skipped - 1), k):
        own.append(value)
        # Of several tokens with one text the most probable stands, so it is written last.
        entries = {named(name): number for name, number in reversed(top)}
        entries.setdefault(named(token), value)
        tops.append(entries)
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}


def _positions(piece: Piece, sequence: Sequence[int], start: int, k: int) -> Any:
    """For every token from ``start + 1``: itself, its k most probable (id, logprob), its own logprob and its rank."""
    scored = piece.scored
    assert scored is not None
    rows = slice(start, len(sequence) - 1)
    ids, logprobs = scored.ids[rows, :k].tolist(), scored.logprobs[rows, :k].tolist()
    tops = [list(zip(names, values, strict=True)) for names, values in zip(ids, logprobs, strict=True)]
    return zip(sequence[start + 1 :], tops, scored.own[rows].tolist(), scored.ranks[rows].tolist(), strict=True)

"""What one client may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["MOST_ENTRIES", "Limits", "Refusal"]

MOST_ENTRIES: Final = 2**20
"""Log-probabilities in one answer: 512 for each of 2,048 tokens, about 80 MB of JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one request, and of all together.

    Attributes:
        body_bytes: Size of a request.
        body_seconds: Time for sending it.
        prompts: Prompts in one request.
        prompt_tokens: Tokens of a prompt and its answer; the model's own context where that is smaller.
        new_tokens: Tokens of an answer.
        requests: Requests under way; further ones are asked to come again.
        top_k: Log-probabilities per token.
        batch_rows: Prompts computed together.
        batch_tokens: Tokens computed together, padding left out.
    """

    body_bytes: int = 8 * 2**20
    body_seconds: float = 30.0
    prompts: int = 64
    prompt_tokens: int = 32768
    new_tokens: int = 4096
    requests: int = 64
    top_k: int = 512
    batch_rows: int = 32
    batch_tokens: int = 8192


class Refusal(Exception):
    """A request that gets no answer.

    Args:
        status: HTTP status.
        message: For the client: what is wrong and what is allowed.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message

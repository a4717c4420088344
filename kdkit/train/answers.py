"""One answer at a time, timed: for a person who compares models by reading, not for scoring."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig

from kdkit.api.data import Example, Message
from kdkit.api.errors import DataError, ModelError
from kdkit.models.chat import ChatEncoder
from kdkit.models.heads import verify_split
from kdkit.models.load import load_model, load_tokenizer
from kdkit.models.positions import positions
from kdkit.models.pretrained import load_errors, quiet
from kdkit.train.rollout import generate, stop_ids

if TYPE_CHECKING:
    from kdkit.api import Model, Sampling

__all__ = ["Answer", "Encoded", "answers", "encode"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Prompts as one model reads them.

    Attributes:
        prompts: Token ids of every prompt.
        templated: Whether the chat template of the model's tokenizer was used.
    """

    prompts: tuple[tuple[int, ...], ...]
    templated: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one prompt.

    Attributes:
        text: The answer, without special tokens.
        tokens: Its length.
        prompt_tokens: Length of the prompt.
        seconds: Reading the prompt and writing the answer, with nothing else in the batch.
        truncated: The token limit came before an end token.
    """

    text: str
    tokens: int
    prompt_tokens: int
    seconds: float
    truncated: bool

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)


def encode(model: Model, examples: Sequence[Example], *, system: str | None, raw: bool, max_new_tokens: int) -> Encoded:
    """The prompts of ``model``. Text becomes a user message when the tokenizer has a chat template, unless ``raw``.

    Args:
        model: Only its tokenizer and configuration are read.
        examples: What to ask; their ids say where they stand.
        system: A system message for every prompt that has none.
        raw: Give text to the model as it is.
        max_new_tokens: Room that the answer needs.

    Raises:
        ModelError: No tokenizer, or it has no chat template and one is needed.
        DataError: A prompt has no tokens, or does not fit the model's context together with its answer.
    """
    tokenizer = load_tokenizer(model)
    encoder = ChatEncoder(tokenizer)
    templated = bool(tokenizer.chat_template) and not raw
    context = _context(model)
    prompts = []
    for example in examples:
        prompt = _messages(example, system) if templated else _text(example, system, model.name, raw=raw)
        ids = tuple(encoder.prompt(replace(example, prompt=prompt)))
        _check_room(example, len(ids), max_new_tokens, context, model.name)
        prompts.append(ids)
    return Encoded(tuple(prompts), templated)


def _messages(example: Example, system: str | None) -> tuple[Message, ...]:
    prompt = example.prompt
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if system is None or any(message.role == "system" for message in messages):
        return messages
    return (Message("system", system), *messages)


def _text(example: Example, system: str | None, model: str, *, raw: bool) -> str:
    if system is None and isinstance(example.prompt, str):
        return example.prompt
    what = "a system message needs" if system is not None else "messages need"
    raise ModelError(
        f"{what} a chat template, {'which raw text leaves out' if raw else 'and the tokenizer has none'}",
        where=f"{model}, {example.id}",
        hint="give the prompt as text" if system is None else "put it into the prompt",
    )


def _context(model: Model) -> int | None:
    """How many tokens the model can read and write; None where its configuration sets no limit."""
    with quiet(), load_errors(model.path, "model"):
        config = AutoConfig.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=model.trust_remote_code
        )
    return positions(config)


def _check_room(example: Example, tokens: int, new: int, context: int | None, model: str) -> None:
    if context is None or tokens + new <= context:
        return
    left = context - tokens
    raise DataError(
        f"{tokens:,} tokens and {new:,} new ones do not fit the context of {model} ({context:,} tokens)",
        where=example.id,
        hint=f"use --max-new-tokens {left} or less" if left > 0 else "shorten the prompt",
    )


def answers(
    model: Model, encoded: Encoded, sampling: Sampling, seeds: Sequence[int], *, dtype: torch.dtype, device: str
) -> Iterator[Answer]:
    """The answers of ``model`` in the order of the prompts; its weights are in memory only while this is read.

    Args:
        model: What to load.
        encoded: Its prompts, from :func:`encode`.
        sampling: Decoding parameters.
        seeds: One per prompt.
        dtype: Precision of the weights.
        device: ``cpu`` or ``cuda``.

    Raises:
        ModelError: The weights cannot be loaded, or the architecture is not supported.
    """
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=dtype).to(device)
    try:
        verify_split(loaded)
        ends = stop_ids(loaded, ChatEncoder(tokenizer))
        for prompt, seed in zip(encoded.prompts, seeds, strict=True):
            started = time.monotonic()
            (said,) = generate(loaded, tokenizer, [prompt], sampling, [seed], stop_ids=ends, batch_size=1)
            seconds = time.monotonic() - started
            yield Answer(said.text, len(said.token_ids), len(prompt), seconds, said.truncated)
    finally:
        del loaded
        # What is left of decoding refers to the model, so its memory would wait for the collector.
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()

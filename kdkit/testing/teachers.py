"""A teacher without a model, whose every number follows from a script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdkit.api.data import Completion, Dense, Example, TokenBatch, TopK
from kdkit.models.load import Vocabulary, token_fingerprint
from kdkit.testing.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from kdkit.api import Sampling

__all__ = ["ScriptedTeacher"]


class ScriptedTeacher:
    """See :class:`kdkit.api.Teacher`. It believes in every token it is shown, and answers from a script.

    Args:
        answers: Text of a prompt (of its last message) to the answer; other prompts get ``default``.
        default: The answer to all other prompts.
        confidence: Probability of the token that a batch holds; all others share the rest evenly.
        top_k: Give that token and so many others less one as a ``TopK`` signal with its tail, instead of all logits.
        tokenizer: Whose tokens; those of the tiny model by default.

    Attributes:
        asked: Every prompt that was given to ``generate``, in order.
        batches: How many batches were shown to ``signals``.
        closed: How often it was closed.
    """

    def __init__(
        self,
        answers: Mapping[str, str] | None = None,
        *,
        default: str = "I do not know.",
        confidence: float = 0.9,
        top_k: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence is {confidence}; allowed: between 0 and 1")
        self.tokenizer = tokenizer or tiny_tokenizer()
        size = len(self.tokenizer)
        self.vocabulary = Vocabulary(size=size, tokens=size, fingerprint=token_fingerprint(self.tokenizer))
        if top_k is not None and not 1 <= top_k < size:
            raise ValueError(f"top_k is {top_k}; allowed: 1 to {size - 1}")
        self._answers = dict(answers or {})
        self._default = default
        self._confidence = confidence
        self._top_k = top_k
        self.asked: list[str] = []
        self.batches = 0
        self.closed = 0

    def signals(self, batch: TokenBatch, /) -> _Signals:
        """What it makes of the valid tokens of a batch."""
        self.batches += 1
        return _Signals(batch.input_ids[batch.labels_mask], self.vocabulary.size, self._confidence, self._top_k)

    def generate(self, prompts: Sequence[Example], sampling: Sampling, seed: int, /) -> list[Completion]:
        """The answers of the script, cut at ``max_new_tokens``; neither seed nor temperature changes them."""
        del seed
        texts = [p.prompt if isinstance(p.prompt, str) else p.prompt[-1].content for p in prompts]
        self.asked += texts
        return [self._completion(self._answers.get(text, self._default), sampling.max_new_tokens) for text in texts]

    def close(self) -> None:
        """Count it."""
        self.closed += 1

    def _completion(self, text: str, limit: int) -> Completion:
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        if len(ids) <= limit:
            return Completion(text, tuple(ids))
        kept = ids[:limit]
        return Completion(self.tokenizer.decode(kept, skip_special_tokens=True), tuple(kept), truncated=True)


@dataclass(frozen=True, slots=True)
class _Signals:
    labels: Tensor
    size: int
    confidence: float
    top_k: int | None

    def block(self, start: int, stop: int, /) -> Dense | TopK:
        """Logits [N, V], which are log-probabilities, or the K tokens that count."""
        labels = self.labels[start:stop]
        other = math.log((1 - self.confidence) / (self.size - 1))
        if self.top_k is None:
            logits = torch.full((len(labels), self.size), other, device=labels.device)
            return Dense(logits.scatter(1, labels[:, None], math.log(self.confidence)))
        offsets = torch.arange(self.top_k, device=labels.device)
        logprobs = torch.full((len(labels), self.top_k), other, device=labels.device)
        logprobs[:, 0] = math.log(self.confidence)
        tail = (1 - self.confidence) * (self.size - self.top_k) / (self.size - 1)
        return TopK(
            ids=(labels[:, None] + offsets) % self.size,
            logprobs=logprobs,
            tail_mass=torch.full((len(labels),), tail, device=labels.device),
            taken=logprobs[:, 0],
        )

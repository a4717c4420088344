"""The model behind the server: top-k log-probabilities of prompts, and answers.

The logits of a batch never exist: hidden states are projected a block of tokens at a time, and of each block only the
k largest log-probabilities are kept.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdkit.api.artifacts import Model
from kdkit.api.data import Completion, Example, Message
from kdkit.models.chat import ChatEncoder, Encoded
from kdkit.models.heads import split, verify_split
from kdkit.models.load import Vocabulary, load_model, load_tokenizer, vocabulary
from kdkit.models.locate import fingerprint
from kdkit.models.positions import positions
from kdkit.train.batching import collate
from kdkit.train.divergences import upcast
from kdkit.train.objective import block_tokens, valid_hidden
from kdkit.train.packing import isolates, pack
from kdkit.train.rollout import generate, stop_ids

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import Sampling

__all__ = ["Scored", "ServedModel"]


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of the tokens of one prompt but its first, which nothing predicts.

    Attributes:
        ids: [T - 1, k] int64, the most probable tokens.
        logprobs: [T - 1, k] float32.
        own: [T - 1] float32, of the token that stands there.
        ranks: [T - 1] int64, its place among all tokens, from 1.
    """

    ids: Tensor
    logprobs: Tensor
    own: Tensor
    ranks: Tensor


class ServedModel:
    """A model with its tokenizer. One thread computes; others may turn text into ids and back.

    Args:
        artifact: The model.
        dtype: Of its weights.
        device: ``cpu`` or ``cuda``.

    Raises:
        ModelError: It cannot be loaded, or its architecture cannot be split into trunk and projection.
    """

    def __init__(self, artifact: Model, *, dtype: torch.dtype, device: str) -> None:
        self._tokenizer = load_tokenizer(artifact)
        self._model = load_model(artifact, dtype=dtype).to(device)
        verify_split(self._model)
        self._parts = split(self._model)
        self._isolates = isolates(self._parts.trunk)
        # One tokenizer cannot be used by two threads at once.
        self._encoder = ChatEncoder(copy.deepcopy(self._tokenizer))
        self._lock = threading.Lock()
        self._stops = stop_ids(self._model, self._encoder)
        self.vocabulary: Vocabulary = vocabulary(self._tokenizer, self._model)
        told = (fingerprint(artifact.path), artifact.keep_layers, str(dtype))
        self.fingerprint: str = hashlib.sha256(repr(told).encode()).hexdigest()
        self.context: int | None = positions(self._model.config)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the answer starts. Raises ``ModelError``, ``DataError``."""
        with self._lock:
            return self._encoder.prompt(Example(id="messages", prompt=tuple(messages)))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of raw text. Raises ``DataError`` when there are none."""
        with self._lock:
            return self._encoder.prompt(Example(id="prompt", prompt=text))

    def text(self, ids: Sequence[int], *, special: bool) -> str:
        """The text of token ids, special tokens included or left out."""
        with self._lock:
            decode = self._encoder.tokenizer.decode
            return str(decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    @torch.no_grad()
    def score(self, prompts: Sequence[Sequence[int]], k: int) -> list[Scored]:
        """Log-probabilities of every prompt, at temperature 1.

        Args:
            prompts: Token ids, none empty.
            k: Entries per token, 0 for none but the token's own.
        """
        long = [index for index, prompt in enumerate(prompts) if len(prompt) > 1]
        rows = [
            Encoded(str(index), tuple(prompts[index]), (False, *(True for _ in prompts[index][1:]))) for index in long
        ]
        k = min(k, self.vocabulary.size)
        done = dict.fromkeys(range(len(prompts)), self._nothing(k))
        if rows:
            device = self._model.device
            batch = pack(rows, device=device) if self._isolates else collate(rows, device=device)
            hidden = valid_hidden(self._parts.trunk, batch)
            labels = batch.input_ids[:, 1:][batch.labels_mask[:, 1:]]
            parts = self._project(hidden, labels, k)
            order = [int(name) for name in batch.example_ids]
            sizes = [len(prompts[index]) - 1 for index in order]
            pieces = zip(*(tensor.split(sizes) for tensor in parts), strict=True)
            done |= {index: Scored(*piece) for index, piece in zip(order, pieces, strict=True)}
        return [done[index] for index in range(len(prompts))]

    def _project(self, hidden: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors of :class:`Scored` for hidden states [N, D] that predict ``labels`` [N], on the CPU."""
        made = []
        size = block_tokens(self.vocabulary.size)
        for rows, wanted in zip(hidden.split(size), labels.split(size), strict=True):
            logits = upcast(self._parts.project(rows))
            total = torch.logsumexp(logits, dim=-1, keepdim=True)
            top = logits.topk(k, dim=-1)
            own = logits.gather(-1, wanted.unsqueeze(-1))
            ranks = (logits > own).sum(dim=-1) + 1
            made.append((top.indices.cpu(), (top.values - total).cpu(), (own - total)[:, 0].cpu(), ranks.cpu()))
        ids, logprobs, own, ranks = (torch.cat(column) for column in zip(*made, strict=True))
        return ids, logprobs, own, ranks

    def _nothing(self, k: int) -> Scored:
        return Scored(torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k), torch.zeros(0), torch.zeros(0))

    def answer(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], batch: int
    ) -> list[Completion]:
        """One completion per prompt, ``batch`` of them decoded together."""
        return generate(self._model, self._tokenizer, prompts, sampling, seeds, stop_ids=self._stops, batch_size=batch)

"""Which of the teacher's tokens are kept, and kept ones as a signal for losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdkit.api.data import Dense, TopK
from kdkit.api.errors import ConformanceError
from kdkit.train.divergences import upcast
from kdkit.train.signal_cache.encode import Kept, lowest_probability

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import TeacherSignal

__all__ = ["Rule", "as_topk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How many ids of a token are kept: the most probable ones, at least one, until any of three limits.

    Attributes:
        mass: Stop once they have this much probability; 1 never stops.
        min_probability: Leave out ids below it.
        max_k: Keep at most this many.
        temperature: The softmax temperature of all probabilities.
        bits: Bits of a level (:mod:`kdkit.train.signal_cache.encode`).
        vocabulary: Only this many leading ids exist.
    """

    mass: float
    min_probability: float
    max_k: int
    temperature: float
    bits: int
    vocabulary: int

    @torch.no_grad()
    def keep(self, signal: TeacherSignal) -> Kept:
        """What is kept of a block.

        Raises:
            ConformanceError: A top-k signal has another temperature, ids beyond the vocabulary, or values that are no
                log-probabilities.
        """
        ids, logprobs = self._dense(signal) if isinstance(signal, Dense) else self._sparse(signal)
        logprobs = logprobs.double()
        probs = logprobs.exp()
        inside = probs.cumsum(dim=-1)
        floor = max(self.min_probability, lowest_probability(self.bits))
        # Rounding may bring the sum to 1 before the last id.
        short = inside < self.mass if self.mass < 1 else torch.ones_like(inside, dtype=torch.bool)
        k = torch.minimum(short.sum(-1) + 1, (probs >= floor).sum(-1)).clamp(1, ids.shape[-1])
        kept = torch.arange(ids.shape[-1], device=ids.device) < k[:, None]
        tail = (1 - inside.gather(-1, k[:, None] - 1)[:, 0]).clamp(min=0)
        tail = torch.where(k == self.vocabulary, torch.zeros_like(tail), tail)
        arrays = (k, ids[kept], logprobs[kept], tail)
        return Kept(*(array.cpu().numpy() for array in arrays))

    def _dense(self, signal: Dense) -> tuple[Tensor, Tensor]:
        logits = upcast(signal.logits[:, : self.vocabulary])
        scaled = logits / self.temperature
        top = scaled.topk(min(self.max_k, scaled.shape[-1]), dim=-1)
        return top.indices, top.values - scaled.logsumexp(dim=-1, keepdim=True)

    def _sparse(self, signal: TopK) -> tuple[Tensor, Tensor]:
        if signal.temperature != self.temperature:
            raise ConformanceError(
                f"the teacher's top-k is taken at temperature {signal.temperature:g}, "
                f"the cache wants {self.temperature:g}"
            )
        highest = int(signal.ids.max()) if signal.ids.numel() else 0
        if highest >= self.vocabulary:
            raise ConformanceError(f"the teacher names token {highest}, the student has {self.vocabulary}")
        if not bool(signal.logprobs.isfinite().any(-1).all()) or float(signal.logprobs.max()) > 1e-3:
            raise ConformanceError("the teacher's top-k has values that are no log-probabilities")
        order = signal.logprobs.topk(min(self.max_k, signal.ids.shape[-1]), dim=-1)
        return signal.ids.gather(-1, order.indices), order.values


def as_topk(kept: Kept, temperature: float, device: torch.device | str) -> TopK:
    """The kept ids as a signal [N, largest k]; slots that a token does not need have the log-probability -inf."""
    width = int(kept.k.max()) if kept.tokens else 1
    filled = np.arange(width) < kept.k[:, None]
    ids = np.zeros(filled.shape, dtype=np.int64)
    logprobs = np.full(filled.shape, -np.inf, dtype=np.float32)
    ids[filled], logprobs[filled] = kept.ids, kept.logprobs
    tail = torch.from_numpy(kept.tail.astype(np.float32)).to(device)
    return TopK(torch.from_numpy(ids).to(device), torch.from_numpy(logprobs).to(device), tail, temperature)

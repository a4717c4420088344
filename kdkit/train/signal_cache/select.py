"""Which of the teacher's tokens are kept, and kept ones as a signal for losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from kdkit.api.data import Dense, TopK
from kdkit.api.errors import ConformanceError
from kdkit.train.divergences import upcast
from kdkit.train.signal_cache.encode import Kept, lowest_probability

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from kdkit.api.data import TeacherSignal

__all__ = ["Rule", "UnfitTokenError", "as_topk"]

_EXCESS: Final = 1e-3
"""By how much a sum of probabilities may exceed 1, from rounding."""
_TAIL_GAP: Final = 1e-2
"""How far probabilities and a tail that the teacher gives may be from 1 together."""


class UnfitTokenError(ConformanceError):
    """What a teacher says about one token is no distribution.

    Attributes:
        token: Which token of the block.
    """

    def __init__(self, what: str, token: int) -> None:
        super().__init__(f"the teacher {what}")
        self.token = token


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
            ConformanceError: A top-k signal has another temperature.
            UnfitTokenError: A token has logits that are NaN or infinite (-inf is a probability of zero), or top-k
                values that are no log-probabilities, of ids that do not exist or repeat, or that do not sum to 1 with
                the tail.
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
        total = scaled.logsumexp(dim=-1, keepdim=True)
        # A NaN or +inf anywhere in the row, and a row of -inf alone, have such a sum.
        _refuse(~total.isfinite()[:, 0], lambda _: "gives logits that are NaN or infinite")
        return top.indices, top.values - total

    def _sparse(self, signal: TopK) -> tuple[Tensor, Tensor]:
        if signal.temperature != self.temperature:
            raise ConformanceError(
                f"the teacher's top-k is taken at temperature {signal.temperature:g}, "
                f"the cache wants {self.temperature:g}"
            )
        ids, logprobs = signal.ids, signal.logprobs.double()
        # An empty slot may have any id.
        used = logprobs > -torch.inf
        bad = ~(logprobs <= _EXCESS) | ~used.any(-1, keepdim=True)
        _refuse(bad.any(-1), lambda _: "gives values that are no log-probabilities")
        strange = used & ((ids < 0) | (ids >= self.vocabulary))
        _refuse(strange.any(-1), lambda row: f"names token {_first(ids, strange, row)}, of {self.vocabulary:,}")
        self._check_sets(ids, used)
        _check_sums(logprobs.exp().sum(-1), signal.tail_mass)
        order = logprobs.topk(min(self.max_k, ids.shape[-1]), dim=-1)
        return ids.gather(-1, order.indices), order.values

    def _check_sets(self, ids: Tensor, used: Tensor) -> None:
        """No id twice; every empty slot counts as an id of its own."""
        empty = self.vocabulary + torch.arange(ids.shape[-1], device=ids.device)
        ordered = torch.where(used, ids, empty).sort(dim=-1).values
        again = ordered[:, 1:] == ordered[:, :-1]
        _refuse(again.any(-1), lambda row: f"names token {_first(ordered[:, 1:], again, row)} twice")


def _check_sums(inside: Tensor, tail: Tensor | None) -> None:
    _refuse(inside > 1 + _EXCESS, lambda row: f"gives probabilities that sum to {float(inside[row]):.4g}")
    if tail is not None:
        whole = inside + tail.double()
        wrong = ~((tail >= -_TAIL_GAP) & ((whole - 1).abs() <= _TAIL_GAP))
        _refuse(wrong, lambda row: f"gives probabilities that sum to {float(whole[row]):.4g} with their tail")


def _refuse(wrong: Tensor, what: Callable[[int], str]) -> None:
    if bool(wrong.any()):
        token = int(wrong.int().argmax())
        raise UnfitTokenError(what(token), token)


def _first(values: Tensor, where: Tensor, row: int) -> int:
    return int(values[row][where[row]][0])


def as_topk(kept: Kept, temperature: float, device: torch.device | str) -> TopK:
    """The kept ids as a signal [N, largest k]; slots that a token does not need have the log-probability -inf."""
    width = int(kept.k.max()) if kept.tokens else 1
    filled = np.arange(width) < kept.k[:, None]
    ids = np.zeros(filled.shape, dtype=np.int64)
    logprobs = np.full(filled.shape, -np.inf, dtype=np.float32)
    ids[filled], logprobs[filled] = kept.ids, kept.logprobs
    tail = torch.from_numpy(kept.tail.astype(np.float32)).to(device)
    return TopK(torch.from_numpy(ids).to(device), torch.from_numpy(logprobs).to(device), tail, temperature)

"""What a cache loses: divergence from the full distribution, and the direction of the gradient it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from kdkit.api.data import Dense, TokenLossInputs
from kdkit.train.divergences import forward_kl, log_classes, upcast
from kdkit.train.signal_cache.select import as_topk

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.train.signal_cache.encode import Kept

__all__ = ["Cosine", "Loss", "cached_kl", "measure"]

_NEAR: Final = 0.1
"""Standard deviation of the noise that makes logits near the teacher's."""


@dataclass(slots=True)
class Cosine:
    """Products of two gradients with respect to the same logits, summed over blocks."""

    both: float = 0.0
    full: float = 0.0
    cached: float = 0.0

    def add(self, full: Tensor, cached: Tensor) -> None:
        """Add a block."""
        self.both += float((full * cached).sum())
        self.full += float((full * full).sum())
        self.cached += float((cached * cached).sum())

    @property
    def value(self) -> float:
        """The cosine of the gradients of all blocks together."""
        return self.both / max(math.sqrt(self.full * self.cached), 1e-300)


@dataclass(slots=True)
class Loss:
    """Sums over blocks. ``kl``: nats.

    Attributes:
        start: Gradients where the student is. Far from the teacher, nearly any cut of it points the same way.
        near: Gradients close to the teacher, where training is to end: what was cut off is most of what is left.
    """

    tokens: int = 0
    kl: float = 0.0
    start: Cosine = field(default_factory=Cosine)
    near: Cosine = field(default_factory=Cosine)
    noise: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def values(self) -> dict[str, float]:
        """KL(full || cached) in nats per token, and the cosines of the gradients."""
        return {
            "kl": self.kl / max(self.tokens, 1),
            "gradient_cosine_start": self.start.value,
            "gradient_cosine_near_teacher": self.near.value,
        }


@torch.no_grad()
def cached_kl(logits: Tensor, kept: Kept, temperature: float) -> Tensor:
    """KL(full || cached), [N] float64 in nats: the cached tail is spread evenly over the ids that were not kept.

    Args:
        logits: [N, V] of the teacher.
        kept: What the cache gives back for the same tokens.
        temperature: Of both.
    """
    full = torch.log_softmax(logits.double() / temperature, dim=-1)
    signal = as_topk(kept, temperature, logits.device)
    k = torch.from_numpy(kept.k).to(logits.device)
    tail = torch.from_numpy(kept.tail).to(logits.device)
    # A tail of zero would make the divergence infinite although float32 cannot tell whether it is zero.
    spread = (tail.clamp(min=torch.finfo(torch.float32).eps) / (logits.shape[-1] - k).clamp(min=1)).log()
    used = torch.isfinite(signal.logprobs)
    # Empty slots repeat the token's first id.
    ids = torch.where(used, signal.ids, signal.ids[:, :1])
    values = torch.where(used, signal.logprobs, signal.logprobs[:, :1]).double()
    cached = spread[:, None].expand_as(full).scatter(-1, ids, values)
    return forward_kl(full, cached)


def measure(total: Loss, teacher: Tensor, student: Tensor, kept: Kept, temperature: float) -> None:
    """Add a block to ``total``.

    The gradients are those of the forward KL with respect to a student's logits: against the full distribution, and as
    training takes it from the cache, over the kept ids and one class for all others. They are taken at the student's
    logits, and at the teacher's with normal noise of 0.1.

    Args:
        total: Sums to add to.
        teacher: [N, V] logits.
        student: [N, V] logits of the model that is to be trained.
        kept: What the cache gives back.
        temperature: Of all of them.
    """
    total.tokens += kept.tokens
    total.kl += float(cached_kl(teacher, kept, temperature).sum())
    signals = Dense(teacher), as_topk(kept, temperature, teacher.device)
    noise = torch.randn(teacher.shape, generator=total.noise).to(teacher.device)
    for cosine, logits in ((total.start, student), (total.near, upcast(teacher) + _NEAR * noise)):
        cosine.add(*(_gradient(logits, signal, temperature) for signal in signals))


def _gradient(student: Tensor, signal: Dense | object, temperature: float) -> Tensor:
    leaf = upcast(student.detach()).clone().requires_grad_()
    labels = torch.zeros(len(leaf), dtype=torch.int64, device=leaf.device)
    with torch.enable_grad():
        loss = forward_kl(*log_classes(TokenLossInputs(leaf, signal, labels), temperature)).sum()  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.double()

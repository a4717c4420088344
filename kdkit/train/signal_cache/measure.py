"""What a cache loses: divergence from the full distribution, and the direction of the gradient it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdkit.api.data import Dense, TokenLossInputs
from kdkit.train.divergences import forward_kl, log_classes, upcast
from kdkit.train.signal_cache.select import as_topk

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.train.signal_cache.encode import Kept

__all__ = ["Loss", "cached_kl", "measure"]


@dataclass(slots=True)
class Loss:
    """Sums over blocks. ``kl``: nats. The three products are of the gradients with respect to the student's logits."""

    tokens: int = 0
    kl: float = 0.0
    both: float = 0.0
    full: float = 0.0
    cached: float = 0.0

    def values(self) -> dict[str, float]:
        """KL(full || cached) in nats per token, and the cosine of the two gradients of all blocks together."""
        return {
            "kl": self.kl / max(self.tokens, 1),
            "gradient_cosine": self.both / max((self.full * self.cached) ** 0.5, 1e-300),
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

    The gradients are those of the forward KL with respect to the student's logits: against the full distribution, and
    as training takes it from the cache, over the kept ids and one class for all others.

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
    full, cached = (_gradient(student, signal, temperature) for signal in signals)
    total.both += float((full * cached).sum())
    total.full += float((full * full).sum())
    total.cached += float((cached * cached).sum())


def _gradient(student: Tensor, signal: Dense | object, temperature: float) -> Tensor:
    leaf = upcast(student.detach()).clone().requires_grad_()
    labels = torch.zeros(len(leaf), dtype=torch.int64, device=leaf.device)
    with torch.enable_grad():
        loss = forward_kl(*log_classes(TokenLossInputs(leaf, signal, labels), temperature)).sum()  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.double()

"""Logits as losses see them, so that whatever is compared with a loss's log-probabilities is computed the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from kdkit.train.divergences import upcast

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.models.heads import CausalParts

__all__ = ["finished", "logit_blocks"]


def finished(projected: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """What the architecture makes of projected logits (a soft cap, a scale), in at least float32."""
    return upcast(transform(upcast(projected)))


@torch.no_grad()
def logit_blocks(hidden: Tensor, parts: CausalParts, size: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Where a block of at most ``size`` tokens starts, and its logits [n, V].

    Args:
        hidden: [N, D] hidden states.
        parts: The model's head and transform.
        size: Tokens of a block.
        dtype: Of the matrix products, that of training.
    """
    head = parts.head
    weight, bias = (None if p is None else p.to(dtype) for p in (head.weight, head.bias))
    for start in range(0, len(hidden), size):
        with torch.autocast(hidden.device.type, enabled=False):
            projected = nn.functional.linear(hidden[start : start + size].to(dtype), weight, bias)
            logits = finished(projected, parts.transform)
        yield start, logits

"""Projection, losses and gradients a block of valid tokens at a time.

The [batch, time, vocabulary] logits never exist: a block is projected, its losses are differentiated at once, and only
the gradients of hidden states and head are kept. Matrix products are fastest over many tokens, what is done to every
logit is fastest while it stays in the processor's cache: so a block of losses is a small part of what is projected
together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from kdkit.api.errors import ConformanceError
from kdkit.train.aligned import Span
from kdkit.train.blocks import Block, BlockSizes, signal_part, taken
from kdkit.train.divergences import upcast
from kdkit.train.logits import finished
from kdkit.train.policy.terms import Taken

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["blocked_logprobs", "blocked_loss"]


def _products(block: Block, sizes: BlockSizes) -> Iterator[list[Span]]:
    """Blocks of losses, in groups that are projected together."""
    group: list[Span] = []
    for span in block.spans(sizes.loss):
        if group and span.stop - group[0].start > sizes.product:
            yield group
            group = []
        group.append(span)
    if group:
        yield group


@torch.no_grad()
def blocked_logprobs(
    hidden: Tensor, head: nn.Linear, block: Block, sizes: BlockSizes, dtype: torch.dtype
) -> list[Taken]:
    """What a block's policy losses are called on, without a gradient: one entry for each of them, [N] each.

    Args:
        hidden: [N, D] hidden states of the taken tokens.
        head: The output projection.
        block: The losses; its completions.
        sizes: Tokens at once: the same as in the pass with a gradient, so that both see the same logits.
        dtype: Of the matrix products.
    """
    terms = [term for term in block.terms if term.kind == "policy"]
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    found: list[list[Taken]] = [[] for _ in terms]
    with torch.autocast(hidden.device.type, enabled=False):
        for group in _products(block, sizes):
            start, stop = group[0].start, group[-1].stop
            projected = nn.functional.linear(hidden[start:stop].to(dtype), weight, bias)
            for span in group:
                logits = finished(projected[span.start - start : span.stop - start], block.transform)
                labels = block.labels[span.start : span.stop]
                for term, parts in zip(terms, found, strict=True):
                    parts.append(taken(term, logits, labels, block.policy, span, entropy=term.wants_entropy))
    return [_joined(parts) for parts in found]


def _joined(parts: Sequence[Taken]) -> Taken:
    entropy = [part.entropy for part in parts if part.entropy is not None]
    return Taken(torch.cat([part.logprobs for part in parts]), torch.cat(entropy) if entropy else None)


def blocked_loss(
    hidden: Tensor, head: nn.Linear, block: Block, sizes: BlockSizes, compute: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Weighted scalar sum to call backward on, once, and the detached plain sum of every term.

    Args:
        hidden: [N, D] hidden states that predict the valid tokens.
        head: The output projection.
        block: The losses.
        sizes: Tokens at once.
        compute: Dtype of the matrix products; None for the parameters' own.
    """
    work = _Work(block, sizes, compute, torch.is_grad_enabled())
    found: tuple[Tensor, Tensor] = _BlockedLoss.apply(hidden, head.weight, head.bias, work)
    return found


@dataclass(frozen=True, slots=True)
class _Work:
    """What the blocked function needs besides tensors; ``learns``: whether gradients are wanted at all."""

    block: Block
    sizes: BlockSizes
    compute: torch.dtype | None
    learns: bool


class _BlockedLoss(torch.autograd.Function):
    """Projection, losses and gradients of a block at a time.

    The gradient is made during the forward pass, where the block's logits already exist; backward only multiplies it by
    the incoming scalar, in place: it is as large as the head. Gradients of the head are accumulated in the head's own
    (master) dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        work: _Work,
    ) -> tuple[Tensor, Tensor]:
        block, dtype = work.block, work.compute or weight.dtype
        needs = [work.learns and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        head = [None if p is None else p.detach().to(dtype) for p in (weight, bias)]
        grads = [torch.zeros_like(t) if need else None for t, need in zip((hidden, weight, bias), needs, strict=True)]
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        sums = total.new_zeros(len(block.terms))
        for group in _products(block, work.sizes):
            loss, parts = _run_product(block, hidden, head, group, grads, dtype)
            total += loss
            sums += parts
        ctx.grads = grads
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] | None = ctx.grads
        if grads is None:
            raise RuntimeError("the blocked loss can be differentiated once")
        ctx.grads = None
        return (*(None if g is None else _scaled(g, grad_loss) for g in grads), None)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """In place, unless a factor in half precision would be off by up to 0.4 % for all of it."""
    wide = upcast(gradient)
    return wide.mul_(factor.to(wide.dtype)).to(gradient.dtype)


def _run_product(
    block: Block,
    hidden: Tensor,
    head: list[Tensor | None],
    group: list[Span],
    grads: list[Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Loss and term sums of what is projected together; adds its gradients to ``grads`` (hidden, weight, bias)."""
    weight, bias = head
    wanted = any(grad is not None for grad in grads)
    start, stop = group[0].start, group[-1].stop
    with torch.autocast(hidden.device.type, enabled=False):
        states = hidden[start:stop].detach().to(dtype)
        projected = nn.functional.linear(states, weight, bias)
        results = _run_losses(block, projected, group, wanted=wanted)
        # Now the gradient with respect to the logits, where these were.
        if grads[0] is not None:
            grads[0][start:stop] = projected @ weight
        if grads[1] is not None:
            grads[1].add_(projected.t() @ states)
        if grads[2] is not None:
            grads[2].add_(projected.sum(dim=0, dtype=grads[2].dtype))
    return results


def _slope(loss: Tensor, leaf: Tensor, block: Block) -> Tensor:
    slope = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    if slope is None:
        raise ConformanceError(
            "a loss has to depend on the student's logits, or nothing is learned",
            where=f"loss {', '.join(term.name for term in block.terms)}",
        )
    return slope


def _run_losses(block: Block, projected: Tensor, group: list[Span], *, wanted: bool) -> tuple[Tensor, Tensor]:
    """Loss and term sums; where a gradient is ``wanted``, it takes the place of the logits [n, V]."""
    start = group[0].start
    teacher = block.teacher(start, group[-1].stop)
    found = []
    for span in group:
        first, last = span.start - start, span.stop - start
        with torch.set_grad_enabled(wanted):
            leaf = projected[first:last].detach().requires_grad_(wanted)
            loss, parts = block(leaf, signal_part(teacher, slice(first, last)), span)
            if wanted:
                projected[first:last] = _slope(loss, leaf, block)
        found.append((loss.detach(), parts))
    return torch.stack([loss for loss, _ in found]).sum(), torch.stack([parts for _, parts in found]).sum(dim=0)

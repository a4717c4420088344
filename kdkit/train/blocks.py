"""Projection, losses and gradients a block of valid tokens at a time.

The [batch, time, vocabulary] logits never exist: a block is projected, its losses are differentiated at once, and only
the gradients of hidden states and head are kept. Matrix products are fastest over many tokens, what is done to every
logit is fastest while it stays in the processor's cache: so a block of losses is a small part of what is projected
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from kdkit.api.data import Dense, TokenLossInputs, TopK
from kdkit.api.errors import ConformanceError
from kdkit.train.aligned import AlignedSignals, Span
from kdkit.train.divergences import upcast
from kdkit.train.logits import finished
from kdkit.train.policy.terms import PolicyGradient, Taken, taken_logprobs

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api import TeacherSignals
    from kdkit.api.data import TeacherSignal
    from kdkit.train.objective import LossTerm
    from kdkit.train.policy.batch import PolicyBatch

__all__ = ["ALIGNED_COPIES", "Block", "BlockSizes", "block_tokens", "blocked_logprobs", "blocked_loss"]

_BLOCK_BYTES: Final = 2**30
"""Memory for one block of float32 logits and what a divergence keeps of them."""
_COPIES: Final = 16
"""Float32 tensors of a block's size that are alive at once (measured: 8 with forward KL, 12 with JSD, 15 with AKL)."""
ALIGNED_COPIES: Final = 8
"""The same for aligned losses, of the widths of both models together (measured: up to 5.8 with ULD)."""
_CACHE_BYTES: Final = 2**22
"""Of one such tensor on a processor. Measured with two cores and 32 MiB of cache, 561 tokens: 0.5 s for all blocks of
0.8 to 12 MiB against 1.3 s for 67 MiB, whose memory the allocator maps anew for every tensor."""
_PRODUCT_BYTES: Final = 2**29
"""Memory for the logits of student and teacher that are projected together; gradients take the student's place."""


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """How many tokens are worked on at once: by the losses, and by a matrix product, for several blocks of losses."""

    loss: int
    product: int

    @classmethod
    def of(cls, vocabulary: int, device: str, itemsize: int) -> BlockSizes:
        """Sizes that keep within the memory budgets, for ``vocabulary`` logits of ``itemsize`` bytes per token."""
        room = _BLOCK_BYTES // _COPIES if device != "cpu" else _CACHE_BYTES
        loss = max(4, min(4096, room // (vocabulary * 4)))
        return cls(loss, max(loss, min(4096, _PRODUCT_BYTES // (vocabulary * 2 * itemsize))))


def block_tokens(vocabulary: int, copies: int = _COPIES) -> int:
    """Tokens of a block that is projected and worked on at once: ``copies`` float32 tensors in the memory budget."""
    return max(16, min(4096, _BLOCK_BYTES // (vocabulary * 4 * copies)))


@dataclass(frozen=True, slots=True)
class Block:
    """The losses of one block as a function of its raw projection.

    Attributes:
        terms: The weighted losses.
        ratios: For every loss, its scale relative to that of a sum over tokens.
        labels: [N] ids of the valid tokens.
        signals: The teacher's view of them.
        transform: What the architecture does to projected logits.
        policy: The completions that the tokens are of, when they are.
        gradients: For every loss, what pass one found when it is a policy loss.
    """

    terms: tuple[LossTerm, ...]
    ratios: tuple[float, ...]
    labels: Tensor
    signals: TeacherSignals | AlignedSignals | None
    transform: Callable[[Tensor], Tensor]
    policy: PolicyBatch | None = None
    gradients: tuple[PolicyGradient | None, ...] = ()

    def spans(self, size: int) -> Iterator[Span]:
        """Blocks of at most ``size`` tokens; no block ends within an aligned group."""
        if isinstance(self.signals, AlignedSignals):
            return self.signals.spans(size)
        return _spans(int(self.labels.shape[0]), size)

    def teacher(self, start: int, stop: int) -> TeacherSignal | None:
        """What the teacher says about tokens ``start`` to ``stop``; None without one, or with one in its own tokens."""
        if self.signals is None or isinstance(self.signals, AlignedSignals):
            return None
        with torch.no_grad():
            return self.signals.block(start, stop)

    def __call__(self, projected: Tensor, teacher: TeacherSignal | None, span: Span) -> tuple[Tensor, Tensor]:
        """Weighted scalar sum with gradient, and the detached plain sum of every term, for the tokens of a block."""
        logits = finished(projected, self.transform)
        weights = self._weights(logits, span)
        sums = [self._term(index, logits, teacher, weights, span) for index in range(len(self.terms))]
        factors = [term.weight * ratio for term, ratio in zip(self.terms, self.ratios, strict=True)]
        weighted = torch.stack([factor * value for factor, value in zip(factors, sums, strict=True)]).sum()
        return weighted, torch.stack([value.detach() for value in sums])

    def _term(
        self, index: int, logits: Tensor, teacher: TeacherSignal | None, weights: Tensor | None, span: Span
    ) -> Tensor:
        term, labels = self.terms[index], self.labels[span.start : span.stop]
        if term.kind == "aligned":
            return self._aligned(term, logits, labels, span)
        if term.kind == "representation":
            return logits[:0].sum()  # its value and gradient come from hidden states, not from logits
        if term.kind == "policy":
            return self._policy(term, self.gradients[index], logits, labels, span)
        if term.sampled and self.policy is not None:
            logits, teacher = _as_sampled(term, logits, teacher, self.policy, span)
        if weights is None or bool(weights.all()):
            return _token_sum(term, logits, teacher, labels, weights)
        # Nothing times infinity is not nothing: a loss never sees tokens without a weight.
        kept = weights.nonzero()[:, 0]
        if not len(kept):
            return logits[:0].sum()
        return _token_sum(term, logits[kept], _part(teacher, kept), labels[kept], weights[kept])

    def _policy(
        self, term: LossTerm, gradient: PolicyGradient | None, logits: Tensor, labels: Tensor, span: Span
    ) -> Tensor:
        """Zero, with the gradient of the policy loss: its value is that of all completions, and known already."""
        if gradient is None:
            raise ConformanceError("a policy loss is called on whole completions first", where=f"loss {term.name}")
        taken = _taken(term, logits, labels, self.policy, span, entropy=gradient.entropy is not None)
        value = _weighted(gradient.logprobs[span.start : span.stop], taken.logprobs)
        if gradient.entropy is not None and taken.entropy is not None:
            value = value + _weighted(gradient.entropy[span.start : span.stop], taken.entropy)
        return value - value.detach()

    def _aligned(self, term: LossTerm, logits: Tensor, labels: Tensor, span: Span) -> Tensor:
        if not isinstance(self.signals, AlignedSignals):
            raise ConformanceError("an aligned loss needs a teacher's view of the same text", where=f"loss {term.name}")
        if not span.groups:
            return logits[:0].sum()
        values = term.loss(self.signals.inputs(logits, labels, span))
        if values.shape != (span.groups,):
            raise ConformanceError(
                f"an aligned loss returns one value per group ({span.groups},), got {tuple(values.shape)}",
                where=f"loss {term.name}",
            )
        return values.sum()

    def _weights(self, logits: Tensor, span: Span) -> Tensor | None:
        """[n] factors of the token losses of a block; None when all are 1."""
        weights = None if self.policy is None else self.policy.weights
        return None if weights is None else weights[span.start : span.stop].to(logits.device, logits.dtype)


def _token_sum(
    term: LossTerm, logits: Tensor, teacher: TeacherSignal | None, labels: Tensor, weights: Tensor | None
) -> Tensor:
    cut = logits if term.vocabulary is None else logits[:, : term.vocabulary]
    values = term.loss(TokenLossInputs(cut, _cut(teacher, term.vocabulary), labels))
    if values.shape != labels.shape:
        raise ConformanceError(
            f"a token loss returns one value per token {tuple(labels.shape)}, got {tuple(values.shape)}",
            where=f"loss {term.name}",
        )
    return values.sum() if weights is None else (weights * values).sum()


def _weighted(factors: Tensor, values: Tensor) -> Tensor:
    """sum(factors * values), also where a value that is not wanted is infinite."""
    return (factors * torch.where(factors != 0, values, 0.0)).sum()


def _part(teacher: TeacherSignal | None, which: slice | Tensor) -> TeacherSignal | None:
    """What a signal says about some of its tokens, in at least float32."""
    if isinstance(teacher, Dense):
        return Dense(upcast(teacher.logits[which]))
    if isinstance(teacher, TopK):
        tail, taken = (None if x is None else x[which] for x in (teacher.tail_mass, teacher.taken))
        return replace(teacher, ids=teacher.ids[which], logprobs=teacher.logprobs[which], tail_mass=tail, taken=taken)
    return teacher


def _cut(teacher: Any, width: int | None) -> Any:
    if width is None or not isinstance(teacher, Dense):
        return teacher
    return Dense(teacher.logits[:, :width])


def _as_sampled(
    term: LossTerm, logits: Tensor, teacher: TeacherSignal | None, policy: PolicyBatch, span: Span
) -> tuple[Tensor, TeacherSignal | None]:
    """Logits of both models whose softmax is what the tokens of a block are sampled from, as in ``_taken``."""
    cut, other = logits[:, : term.vocabulary], _cut(teacher, term.vocabulary)
    if policy.support is None and policy.temperature == 1.0:
        return cut, other
    if other is not None and not isinstance(other, Dense):
        raise ConformanceError(
            f"a {type(other).__name__} signal is of the whole vocabulary at temperature 1", where=f"loss {term.name}"
        )
    cut, dense = cut / policy.temperature, None if other is None else other.logits / policy.temperature
    if policy.support is not None:
        outside = ~policy.support.kept(span.start, span.stop, cut.shape[1], cut.device)
        cut = cut.masked_fill(outside, -torch.inf)
        dense = None if dense is None else dense.masked_fill(outside, -torch.inf)
    return cut, None if dense is None else Dense(dense)


def _taken(
    term: LossTerm, logits: Tensor, labels: Tensor, policy: PolicyBatch | None, span: Span, *, entropy: bool
) -> Taken:
    if policy is None:
        raise ConformanceError("a policy loss needs completions of the student's own", where=f"loss {term.name}")
    cut = logits[:, : term.vocabulary]
    kept = policy.support.kept(span.start, span.stop, cut.shape[1], cut.device) if policy.support else None
    return taken_logprobs(cut, labels, temperature=policy.temperature, kept=kept, entropy=entropy)


def _spans(count: int, size: int) -> Iterator[Span]:
    return (Span(start, min(start + size, count)) for start in range(0, count, size))


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
                    parts.append(_taken(term, logits, labels, block.policy, span, entropy=term.wants_entropy))
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
            loss, parts = block(leaf, _part(teacher, slice(first, last)), span)
            if wanted:
                projected[first:last] = _slope(loss, leaf, block)
        found.append((loss.detach(), parts))
    return torch.stack([loss for loss, _ in found]).sum(), torch.stack([parts for _, parts in found]).sum(dim=0)

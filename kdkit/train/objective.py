"""The one module that training wraps: trunk, output projection and losses in a single forward.

The projection, the losses and their gradient run block by block over valid tokens, so that the [batch, time,
vocabulary] logits of neither model ever exist. Being inside the wrapped forward, the output head takes part in the
gradient hooks of DDP like every other parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn

from kdkit.api.data import Dense, TokenBatch, TokenLossInputs
from kdkit.api.errors import ConformanceError, ModelError
from kdkit.models.heads import split
from kdkit.train.aligned import AlignedSignals, Span
from kdkit.train.divergences import upcast
from kdkit.train.packing import isolates, unpack

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api import TeacherSignals
    from kdkit.api.data import TeacherSignal
    from kdkit.api.protocols import Loss

__all__ = ["CausalObjective", "LossTerm", "Measured", "block_tokens", "valid_hidden"]

_HALF: Final = frozenset({torch.bfloat16, torch.float16})
_BLOCK_BYTES: Final = 2**30
"""Memory for one block of float32 logits and what a divergence keeps of them."""
_COPIES: Final = 16
"""Float32 tensors of a block's size that are alive at once (measured: 8 with forward KL, 12 with JSD, 15 with AKL)."""
_ALIGNED_COPIES: Final = 8
"""The same for aligned losses, of the widths of both models together (measured: up to 5.8 with ULD)."""


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A weighted loss: of tokens, or of groups of tokens aligned with those of a teacher with another tokenizer.

    ``vocabulary``: a token loss compares only this many leading entries with the teacher's; for an aligned loss it is
    how many entries the teacher has, which the memory of a block depends on.
    """

    name: str
    weight: float
    loss: Loss
    vocabulary: int | None = None
    kind: Literal["token", "aligned"] = "token"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one forward gives.

    Attributes:
        loss: Scalar to call backward on: ``scale`` times the weighted sum over valid tokens.
        sums: [number of losses] detached sums over valid tokens, or over groups, unweighted and unscaled.
        tokens: Number of valid tokens.
        groups: Number of aligned groups.
    """

    loss: Tensor
    sums: Tensor
    tokens: int
    groups: int = 0


def block_tokens(vocabulary: int, copies: int = _COPIES) -> int:
    """Tokens per block that keep a block's work, ``copies`` float32 tensors, within the memory budget."""
    return max(16, min(4096, _BLOCK_BYTES // (vocabulary * 4 * copies)))


def valid_hidden(trunk: nn.Module, batch: TokenBatch) -> Tensor:
    """Hidden states that predict the learned tokens, [N, D], in row-major order: position t - 1 for a token at t."""
    out = trunk(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    hidden: Tensor = out.last_hidden_state
    return hidden[:, :-1][batch.labels_mask[:, 1:]]


class CausalObjective(nn.Module):
    """A student with its losses.

    Args:
        model: A causal language model whose output head is a plain linear layer.
        terms: The weighted losses.
        compute: Dtype of matrix products; None computes in the parameters' own dtype (reference tests).
        block: Tokens per block; chosen from the vocabulary by default.

    Raises:
        ModelError: The output head is not a plain linear layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        terms: Sequence[LossTerm],
        *,
        compute: torch.dtype | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.terms = tuple(terms)
        self._parts = split(model)
        head = self._parts.head
        if type(head) is not nn.Linear:
            raise ModelError(
                f"the output head of {type(model).__name__} is a {type(head).__name__}",
                allowed="a plain linear layer",
                hint="merge adapters into the head first",
            )
        self._compute = compute
        self._isolates: bool | None = None
        others = sum(term.vocabulary or 0 for term in self.terms if term.kind == "aligned")
        self._block = block or block_tokens(head.weight.shape[0] + others, _ALIGNED_COPIES if others else _COPIES)

    def isolates(self) -> bool:
        """Whether the trunk keeps rows apart that lie end to end, measured once: on its device, in its precision."""
        if self._isolates is None:
            device = self._parts.head.weight.device.type
            with torch.autocast(device, self._compute, enabled=self._compute in _HALF):
                self._isolates = isolates(self._parts.trunk)
        return self._isolates

    def forward(
        self,
        batch: TokenBatch,
        signals: TeacherSignals | AlignedSignals | None,
        scale: float,
        group_scale: float = 0.0,
    ) -> Measured:
        """Weighted loss sum over the batch's valid tokens times ``scale``, and over its groups times ``group_scale``.

        Args:
            batch: Token ids and masks of the micro-batch; rows laid end to end are padded for a model that would see
                across them.
            signals: The teacher's view of the same valid tokens, or of the same text, when a loss needs one.
            scale: 1 / (valid tokens of the whole optimiser step), times the world size under DDP.
            group_scale: 1 / (aligned groups of the whole optimiser step), times the world size under DDP.
        """
        if batch.attention_mask is None and not self.isolates():
            batch = unpack(batch)
        device = batch.input_ids.device.type
        with torch.autocast(device, self._compute, enabled=self._compute in _HALF):
            hidden = valid_hidden(self._parts.trunk, batch)
        labels = batch.input_ids[:, 1:][batch.labels_mask[:, 1:]]
        head = self._parts.head
        ratios = tuple(group_scale / scale if term.kind == "aligned" else 1.0 for term in self.terms)
        block = _Block(self.terms, ratios, labels, signals, self._parts.transform)
        work = _Work(block, self._block, self._compute, torch.is_grad_enabled())
        loss, sums = _BlockedLoss.apply(hidden, head.weight, head.bias, work)
        groups = signals.groups if isinstance(signals, AlignedSignals) else 0
        return Measured(loss * scale, sums, int(labels.shape[0]), groups)


@dataclass(frozen=True, slots=True)
class _Block:
    """The losses of one block as a function of its raw projection."""

    terms: tuple[LossTerm, ...]
    ratios: tuple[float, ...]
    labels: Tensor
    signals: TeacherSignals | AlignedSignals | None
    transform: Callable[[Tensor], Tensor]

    def spans(self, size: int) -> Iterator[Span]:
        """Blocks of at most ``size`` tokens; no block ends within an aligned group."""
        if isinstance(self.signals, AlignedSignals):
            return self.signals.spans(size)
        count = int(self.labels.shape[0])
        return (Span(start, min(start + size, count)) for start in range(0, count, size))

    def __call__(self, projected: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Weighted scalar sum with gradient, and the detached plain sum of every term, for the tokens of a block."""
        logits = upcast(self.transform(upcast(projected)))
        labels = self.labels[span.start : span.stop]
        teacher = None
        if self.signals is not None and not isinstance(self.signals, AlignedSignals):
            with torch.no_grad():
                teacher = self.signals.block(span.start, span.stop)
        sums = [
            self._aligned(term, logits, labels, span)
            if term.kind == "aligned"
            else _token_sum(term, logits, teacher, labels)
            for term in self.terms
        ]
        factors = [term.weight * ratio for term, ratio in zip(self.terms, self.ratios, strict=True)]
        weighted = torch.stack([factor * value for factor, value in zip(factors, sums, strict=True)]).sum()
        return weighted, torch.stack([value.detach() for value in sums])

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


def _token_sum(term: LossTerm, logits: Tensor, teacher: TeacherSignal | None, labels: Tensor) -> Tensor:
    cut = logits if term.vocabulary is None else logits[:, : term.vocabulary]
    values = term.loss(TokenLossInputs(cut, _cut(teacher, term.vocabulary), labels))
    if values.shape != labels.shape:
        raise ConformanceError(
            f"a token loss returns one value per token {tuple(labels.shape)}, got {tuple(values.shape)}",
            where=f"loss {term.name}",
        )
    return values.sum()


@dataclass(frozen=True, slots=True)
class _Work:
    """What the blocked function needs besides tensors; ``learns``: whether gradients are wanted at all."""

    block: _Block
    size: int
    compute: torch.dtype | None
    learns: bool


def _cut(teacher: Any, width: int | None) -> Any:
    if width is None or not isinstance(teacher, Dense):
        return teacher
    return Dense(teacher.logits[:, :width])


class _BlockedLoss(torch.autograd.Function):
    """Projection, losses and gradients of a block at a time.

    The gradient is made during the forward pass, where the block's logits already exist; backward only multiplies it by
    the incoming scalar. Gradients of the head are accumulated in the head's own (master) dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        work: _Work,
    ) -> tuple[Tensor, Tensor]:
        block, size, dtype = work.block, work.size, work.compute or weight.dtype
        needs = [work.learns and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        head = [None if p is None else p.detach().to(dtype).requires_grad_(need) for p, need in
                zip((weight, bias), needs[1:], strict=True)]  # fmt: skip
        grads = [torch.zeros_like(t) if need else None for t, need in zip((hidden, weight, bias), needs, strict=True)]
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        sums = total.new_zeros(len(block.terms))
        for span in block.spans(size):
            loss, parts = _run_block(block, hidden[span.start : span.stop], head, span, grads, dtype)
            total += loss
            sums += parts
        ctx.save_for_backward(*[g for g in grads if g is not None])
        ctx.present = [g is not None for g in grads]
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) if present else None for present in ctx.present]
        return (*(None if g is None else g * grad_loss.to(g.dtype) for g in grads), None)


def _run_block(
    block: _Block,
    hidden: Tensor,
    head: list[Tensor | None],
    span: Span,
    grads: list[Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Loss and term sums of one block; adds its gradients to ``grads`` (hidden, weight, bias) where those exist."""
    weight, bias = head
    wanted = any(grad is not None for grad in grads)
    device = hidden.device.type
    with torch.set_grad_enabled(wanted), torch.autocast(device, enabled=False):
        leaf = hidden.detach().to(dtype).requires_grad_(grads[0] is not None)
        loss, parts = block(nn.functional.linear(leaf, weight, bias), span)
        inputs = [t for t, g in zip((leaf, weight, bias), grads, strict=True) if g is not None]
        made = iter(torch.autograd.grad(loss, inputs) if inputs else ())
    if grads[0] is not None:
        grads[0][span.start : span.stop] = next(made).to(grads[0].dtype)
    for total in grads[1:]:
        if total is not None:
            total.add_(next(made))
    return loss.detach(), parts

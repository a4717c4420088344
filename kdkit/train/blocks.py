"""What the losses of a block of tokens are: their values from its logits, and how large a block may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

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

__all__ = ["ALIGNED_COPIES", "Block", "BlockSizes", "block_tokens", "signal_part", "taken"]

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
        return _token_sum(term, logits[kept], signal_part(teacher, kept), labels[kept], weights[kept])

    def _policy(
        self, term: LossTerm, gradient: PolicyGradient | None, logits: Tensor, labels: Tensor, span: Span
    ) -> Tensor:
        """Zero, with the gradient of the policy loss: its value is that of all completions, and known already."""
        if gradient is None:
            raise ConformanceError("a policy loss is called on whole completions first", where=f"loss {term.name}")
        found = taken(term, logits, labels, self.policy, span, entropy=gradient.entropy is not None)
        value = _weighted(gradient.logprobs[span.start : span.stop], found.logprobs)
        if gradient.entropy is not None and found.entropy is not None:
            value = value + _weighted(gradient.entropy[span.start : span.stop], found.entropy)
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


def signal_part(teacher: TeacherSignal | None, which: slice | Tensor) -> TeacherSignal | None:
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
    """Logits of both models whose softmax is what the tokens of a block are sampled from, as in :func:`taken`."""
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


def taken(
    term: LossTerm, logits: Tensor, labels: Tensor, policy: PolicyBatch | None, span: Span, *, entropy: bool
) -> Taken:
    """Log-probabilities of the tokens that were taken, and of a block's distributions the entropy if it is wanted.

    Raises:
        ConformanceError: There are no completions that the tokens are of.
    """
    if policy is None:
        raise ConformanceError("a policy loss needs completions of the student's own", where=f"loss {term.name}")
    cut = logits[:, : term.vocabulary]
    kept = policy.support.kept(span.start, span.stop, cut.shape[1], cut.device) if policy.support else None
    return taken_logprobs(cut, labels, temperature=policy.temperature, kept=kept, entropy=entropy)


def _spans(count: int, size: int) -> Iterator[Span]:
    return (Span(start, min(start + size, count)) for start in range(0, count, size))

"""Teacher-forced scores: negative log-likelihood and full-vocabulary KL to a teacher, per example or per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from kdkit.api.data import Dense, TokenBatch, TokenLossInputs
from kdkit.api.errors import ConformanceError
from kdkit.models.heads import CausalParts, split
from kdkit.train.batching import collate
from kdkit.train.divergences import forward_kl, log_classes, reverse_kl, upcast
from kdkit.train.objective import block_tokens, valid_hidden

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api import TeacherSignals
    from kdkit.models.chat import Encoded

__all__ = ["ExampleScore", "score_examples", "token_kl"]

_Divergence: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""Of log-probabilities of teacher and model, both [n, V]."""


@dataclass(frozen=True, slots=True)
class ExampleScore:
    """Sums over the learned tokens of one example, in nats; ``teacher_kl`` is None without a teacher."""

    nll: float
    tokens: int
    teacher_kl: float | None = None


@torch.no_grad()
def score_examples(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    signals: Callable[[TokenBatch], TeacherSignals] | None = None,
    vocabulary: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[ExampleScore]:
    """One score per row, in order.

    Args:
        model: In evaluation mode.
        rows: Encoded examples.
        batch_size: Rows per forward pass.
        signals: The teacher's view of a batch, for the KL.
        vocabulary: Leading entries that student and teacher share; all when None.
        on_batch: Called with the number of finished rows after every batch.

    Raises:
        ConformanceError: The teacher gives only its top k probabilities.
    """
    scores: dict[int, ExampleScore] = {}
    for chosen, batch in _batches(model, rows, batch_size):
        scores.update(zip(chosen, _score_batch(split(model), batch, signals, vocabulary), strict=True))
        if on_batch:
            on_batch(len(scores))
    return [scores[i] for i in range(len(rows))]


@torch.no_grad()
def token_kl(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    signals: Callable[[TokenBatch], TeacherSignals],
    vocabulary: int | None = None,
    reverse: bool = False,
) -> list[tuple[float, ...]]:
    """KL(teacher || model) in nats at every learned token of every row, in the order of the rows and their tokens.

    ``reverse`` gives KL(model || teacher); the other arguments are those of :func:`score_examples`. The value at a
    token depends on the tokens before it only, so the id that stands at the row's last place does not matter.
    """
    traces: dict[int, tuple[float, ...]] = {}
    for chosen, batch in _batches(model, rows, batch_size):
        # Where the two agree, rounding can put a divergence below 0.
        measure = reverse_kl if reverse else forward_kl
        values = _batch_values(split(model), batch, signals(batch), vocabulary, measure)[:, 1].clamp(min=0).tolist()
        done = 0
        for index in chosen:
            traces[index] = tuple(values[done : done + rows[index].targets])
            done += rows[index].targets
    return [traces[i] for i in range(len(rows))]


def _batches(
    model: PreTrainedModel, rows: Sequence[Encoded], batch_size: int
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Batches of rows of similar length, longest first, with the places of their rows."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen, collate([rows[i] for i in chosen], device=model.device)


def _score_batch(
    parts: CausalParts,
    batch: TokenBatch,
    signals: Callable[[TokenBatch], TeacherSignals] | None,
    vocabulary: int | None,
) -> list[ExampleScore]:
    teacher = signals(batch) if signals else None
    # float64 sums: the order in which blocks are added must not show in the printed digits.
    per_token = _batch_values(parts, batch, teacher, vocabulary).double()
    row_of = batch.labels_mask[:, 1:].nonzero()[:, 0]
    sums = torch.zeros(batch.input_ids.shape[0], 3, dtype=torch.float64, device=per_token.device)
    sums.index_add_(0, row_of, torch.cat([per_token, torch.ones_like(per_token[:, :1])], dim=1))
    return [ExampleScore(nll, int(n), kl if teacher is not None else None) for nll, kl, n in sums.tolist()]


def _batch_values(
    parts: CausalParts,
    batch: TokenBatch,
    teacher: TeacherSignals | None,
    vocabulary: int | None,
    divergence: _Divergence = forward_kl,
) -> Tensor:
    """[N, 2]: :func:`_token_values` of all learned tokens of a batch, in row-major order, block by block."""
    hidden, labels = valid_hidden(parts.trunk, batch), batch.input_ids[:, 1:][batch.labels_mask[:, 1:]]
    size = block_tokens(parts.head.weight.shape[0])
    values = [
        _token_values(parts, hidden[a : a + size], labels[a : a + size], teacher, a, vocabulary, divergence)
        for a in range(0, len(labels), size)
    ]
    return torch.cat(values)


def _token_values(
    parts: CausalParts,
    hidden: Tensor,
    labels: Tensor,
    teacher: TeacherSignals | None,
    start: int,
    width: int | None,
    divergence: _Divergence,
) -> Tensor:
    """[n, 2]: negative log-likelihood and divergence of every token of a block; that is 0 without a teacher."""
    logits = upcast(parts.project(hidden))
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    kl = torch.zeros_like(nll)
    if teacher is not None:
        signal = teacher.block(start, start + len(labels))
        if not isinstance(signal, Dense):
            # Over K tokens and a bucket it is a lower bound, and depends on K.
            raise ConformanceError(f"full-vocabulary KL needs the teacher's logits, which gave {type(signal).__name__}")
        shared = Dense(signal.logits[:, :width])
        kl = divergence(*log_classes(TokenLossInputs(logits[:, :width], shared, labels), 1.0))
    return torch.stack([nll, kl], dim=1)

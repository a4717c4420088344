"""Log-probabilities of sampled tokens under the policy that sampled them and under the teacher.

They are taken as the policy losses take them: from the forward pass of training, over the shared vocabulary, at the
temperature of the sampling, and over the tokens that top-k and top-p kept. So at the first update every ratio is one,
up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from kdkit.api.data import Dense, TokenBatch
from kdkit.api.errors import StageError
from kdkit.models.heads import split
from kdkit.train.batching import collate, micro_batches
from kdkit.train.blocks import block_tokens
from kdkit.train.divergences import upcast
from kdkit.train.objective import valid_hidden
from kdkit.train.packing import isolates, pack
from kdkit.train.policy.batch import PolicyBatch, policy_batch
from kdkit.train.policy.rows import PolicyRow
from kdkit.train.policy.terms import taken_logprobs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api import TeacherSignals
    from kdkit.api.data import TeacherSignal
    from kdkit.models.chat import Encoded

__all__ = ["Scorer"]

_HALF: Final = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True, slots=True)
class Scorer:
    """Fills in the log-probabilities of completions.

    Attributes:
        model: The student, in evaluation mode when it is called.
        signals: The teacher's view of a batch.
        teacher: Its name, for errors.
        temperature: Of the sampling.
        vocabulary: Leading entries that both models have.
        compute: Precision of the student's matrix products, as in training.
        batch_size: Rows of a forward pass.
        padding_free: Rows lie end to end, for models that keep them apart.
    """

    model: PreTrainedModel
    signals: Callable[[TokenBatch], TeacherSignals]
    teacher: str
    temperature: float
    vocabulary: int
    compute: torch.dtype
    batch_size: int
    padding_free: bool = True

    @torch.no_grad()
    def __call__(self, rows: Sequence[PolicyRow]) -> list[PolicyRow]:
        """The rows with ``old_logprobs`` and ``teacher_logprobs``, in their order.

        Raises:
            StageError: The teacher does not say how probable a sampled token is.
        """
        numbered = [replace(row, id=str(place)) for place, row in enumerate(rows)]
        half, device = self.compute in _HALF, self.model.device.type
        with torch.autocast(device, self.compute, enabled=half):
            packed = self.padding_free and isolates(split(self.model).trunk)
        lay, found = self._lay(packed=packed), dict[int, tuple[tuple[float, ...], tuple[float, ...]]]()
        for part in micro_batches(numbered, self.batch_size):
            batch, policy = policy_batch([numbered[int(row.id)] for row in part], lay, self.temperature)
            old, teacher = self._batch(batch, policy)
            sizes = policy.lengths.tolist()
            pairs = zip(batch.example_ids, old.cpu().split(sizes), teacher.cpu().split(sizes), strict=True)
            found |= {int(place): (tuple(q.tolist()), tuple(p.tolist())) for place, q, p in pairs}
        return [
            replace(row, old_logprobs=found[place][0], teacher_logprobs=found[place][1])
            for place, row in enumerate(rows)
        ]

    def _lay(self, *, packed: bool) -> Callable[[Sequence[Encoded]], TokenBatch]:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        device = self.model.device
        return lambda rows: pack(rows, device=device, limit=limit) if packed else collate(rows, device=device)

    def _batch(self, batch: TokenBatch, policy: PolicyBatch) -> tuple[Tensor, Tensor]:
        """[N] under the student and [N] under the teacher, of all taken tokens."""
        parts = split(self.model)
        with torch.autocast(batch.input_ids.device.type, self.compute, enabled=self.compute in _HALF):
            hidden = valid_hidden(parts.trunk, batch)
        labels = batch.input_ids[:, 1:][batch.labels_mask[:, 1:]]
        head, signals = parts.head, self.signals(batch)
        weight, bias = (None if p is None else p.to(self.compute) for p in (head.weight, head.bias))
        size = block_tokens(int(head.weight.shape[0]))
        old, teacher = [], []
        for start in range(0, len(labels), size):
            stop = min(start + size, len(labels))
            kept = policy.support.kept(start, stop, self.vocabulary, labels.device) if policy.support else None
            projected = nn.functional.linear(hidden[start:stop].to(self.compute), weight, bias)
            old.append(self._taken(upcast(parts.transform(upcast(projected))), labels[start:stop], kept))
            teacher.append(self._of_teacher(signals.block(start, stop), labels[start:stop], kept))
        return torch.cat(old), torch.cat(teacher)

    def _taken(self, logits: Tensor, labels: Tensor, kept: Tensor | None) -> Tensor:
        return taken_logprobs(logits[:, : self.vocabulary], labels, temperature=self.temperature, kept=kept).logprobs

    def _of_teacher(self, signal: TeacherSignal, labels: Tensor, kept: Tensor | None) -> Tensor:
        if isinstance(signal, Dense):
            return self._taken(upcast(signal.logits), labels, kept)
        if signal.taken is None:
            raise StageError(
                f"the teacher '{self.teacher}' does not give the log-probability of the sampled token, only of its "
                f"{signal.ids.shape[1]} most probable ones",
                hint="rewards need it; use a teacher that does, such as local",
            )
        if kept is not None or self.temperature != signal.temperature:
            raise StageError(
                f"the teacher '{self.teacher}' gives log-probabilities of the whole vocabulary at temperature "
                f"{signal.temperature:g}",
                hint="sample at this temperature, without top_k and top_p",
            )
        return signal.taken

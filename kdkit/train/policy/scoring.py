"""Log-probabilities of sampled tokens under the policy that sampled them, a teacher and a frozen reference.

They are taken as the policy losses take them: from the forward pass of training, over the shared vocabulary, at the
temperature of the sampling, and over the tokens that top-k and top-p kept. So at the first update every ratio is one,
up to rounding.
"""

from __future__ import annotations

import math
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
from kdkit.train.policy.terms import Taken, taken_logprobs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api import TeacherSignals
    from kdkit.api.data import TeacherSignal
    from kdkit.models.chat import Encoded

__all__ = ["Scorer"]

_ENTROPY: Final = "entropy"
_HALF: Final = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True, slots=True)
class Scorer:
    """Fills in the log-probabilities of completions.

    Attributes:
        model: The student, in evaluation mode when it is called.
        signals: The teacher's view of a batch; None without a teacher.
        teacher: Its name, for errors.
        temperature: Of the sampling.
        vocabulary: Leading entries that all of the models have.
        compute: Precision of the student's matrix products, as in training.
        batch_size: Rows of a forward pass.
        padding_free: Rows lie end to end, for models that keep them apart.
        reference: A frozen model with the student's vocabulary, in its own precision.
    """

    model: PreTrainedModel
    signals: Callable[[TokenBatch], TeacherSignals] | None
    teacher: str
    temperature: float
    vocabulary: int
    compute: torch.dtype
    batch_size: int
    padding_free: bool = True
    reference: PreTrainedModel | None = None

    def __call__(self, rows: Sequence[PolicyRow]) -> list[PolicyRow]:
        """The rows with ``old_logprobs``, and those of teacher and reference if there are any, in their order.

        Raises:
            StageError: The teacher does not say how probable a sampled token is.
        """
        return self.score(rows)[0]

    @torch.no_grad()
    def score(self, rows: Sequence[PolicyRow]) -> tuple[list[PolicyRow], float]:
        """As for a call, with the mean entropy in nats of what the tokens were sampled from."""
        if self.reference is not None:
            self.reference.to(self.model.device)  # type: ignore[arg-type]
        numbered = [replace(row, id=str(place)) for place, row in enumerate(rows)]
        half, device = self.compute in _HALF, self.model.device.type
        with torch.autocast(device, self.compute, enabled=half):
            packed = self.padding_free and isolates(split(self.model).trunk)
        lay, found = self._lay(packed=packed), dict[int, dict[str, tuple[float, ...]]]()
        for part in micro_batches(numbered, self.batch_size):
            batch, policy = policy_batch([numbered[int(row.id)] for row in part], lay, self.temperature)
            sizes = policy.lengths.tolist()
            cut = {name: values.cpu().split(sizes) for name, values in self._batch(batch, policy).items()}
            for index, place in enumerate(batch.example_ids):
                found[int(place)] = {name: tuple(parts[index].tolist()) for name, parts in cut.items()}
        entropies = [value for place in range(len(rows)) for value in found[place].pop(_ENTROPY)]
        made: list[PolicyRow] = [replace(row, **found[place]) for place, row in enumerate(rows)]  # type: ignore[arg-type]
        return made, math.fsum(entropies) / len(entropies)

    def _lay(self, *, packed: bool) -> Callable[[Sequence[Encoded]], TokenBatch]:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        device = self.model.device
        return lambda rows: pack(rows, device=device, limit=limit) if packed else collate(rows, device=device)

    def _batch(self, batch: TokenBatch, policy: PolicyBatch) -> dict[str, Tensor]:
        """[N] of all taken tokens: log-probabilities by the names of fields of rows, and the student's entropy."""
        hidden = self._hidden(self.model, batch)
        reference = None if self.reference is None else self._hidden(self.reference, batch)
        labels = batch.input_ids[:, 1:][batch.labels_mask[:, 1:]]
        signals = None if self.signals is None else self.signals(batch)
        size = block_tokens(int(split(self.model).head.weight.shape[0]))
        found: dict[str, list[Tensor]] = {}
        for start in range(0, len(labels), size):
            stop = min(start + size, len(labels))
            kept = policy.support.kept(start, stop, self.vocabulary, labels.device) if policy.support else None
            own = self._taken(self._logits(self.model, hidden[start:stop]), labels[start:stop], kept)
            found.setdefault("old_logprobs", []).append(own.logprobs)
            if own.entropy is not None:
                found.setdefault(_ENTROPY, []).append(own.entropy)
            if signals is not None:
                teacher = self._of_teacher(signals.block(start, stop), labels[start:stop], kept)
                found.setdefault("teacher_logprobs", []).append(teacher)
            if self.reference is not None and reference is not None:
                logits = self._logits(self.reference, reference[start:stop])
                frozen = self._taken(logits, labels[start:stop], kept, entropy=False)
                found.setdefault("ref_logprobs", []).append(frozen.logprobs)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _hidden(self, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
        with torch.autocast(batch.input_ids.device.type, self.compute, enabled=self.compute in _HALF):
            return valid_hidden(split(model).trunk, batch)

    def _logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        parts = split(model)
        weight, bias = (None if p is None else p.to(self.compute) for p in (parts.head.weight, parts.head.bias))
        projected = nn.functional.linear(hidden.to(self.compute), weight, bias)
        return upcast(parts.transform(upcast(projected)))

    def _taken(self, logits: Tensor, labels: Tensor, kept: Tensor | None, *, entropy: bool = True) -> Taken:
        return taken_logprobs(
            logits[:, : self.vocabulary], labels, temperature=self.temperature, kept=kept, entropy=entropy
        )

    def _of_teacher(self, signal: TeacherSignal, labels: Tensor, kept: Tensor | None) -> Tensor:
        if isinstance(signal, Dense):
            return self._taken(upcast(signal.logits), labels, kept, entropy=False).logprobs
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

"""Log-probabilities of sampled tokens under the policy that sampled them, a teacher and a frozen reference.

They are taken as the policy losses take them: from the forward pass of training, over the shared vocabulary, at the
temperature of the sampling, and over the tokens that top-k and top-p kept. So at the first update every ratio is one,
up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import TYPE_CHECKING, Final

import torch

from kdkit.api.data import Dense, TokenBatch
from kdkit.api.errors import StageError
from kdkit.models.heads import split
from kdkit.train.batching import collate, micro_batches
from kdkit.train.blocks import block_tokens
from kdkit.train.divergences import upcast
from kdkit.train.logits import logit_blocks
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
        labels = batch.input_ids[:, 1:][batch.labels_mask[:, 1:]]
        signals = None if self.signals is None else self.signals(batch)
        size = block_tokens(int(split(self.model).head.weight.shape[0]))
        frozen = repeat(None) if self.reference is None else self._logits(self.reference, batch, size)
        found: dict[str, list[Tensor]] = {}
        for (start, logits), of_reference in zip(self._logits(self.model, batch, size), frozen, strict=False):
            stop = start + len(logits)
            kept = policy.support.kept(start, stop, self.vocabulary, labels.device) if policy.support else None
            own = self._taken(logits, labels[start:stop], kept, entropy=True)
            found.setdefault("old_logprobs", []).append(own.logprobs)
            if own.entropy is not None:
                found.setdefault(_ENTROPY, []).append(own.entropy)
            if signals is not None:
                teacher = self._of_teacher(signals.block(start, stop), labels[start:stop], kept)
                found.setdefault("teacher_logprobs", []).append(teacher)
            if of_reference is not None:
                taken = self._taken(of_reference[1], labels[start:stop], kept)
                found.setdefault("ref_logprobs", []).append(taken.logprobs)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _logits(self, model: PreTrainedModel, batch: TokenBatch, size: int) -> Iterator[tuple[int, Tensor]]:
        """Where blocks of taken tokens start, and their logits as losses see them."""
        parts = split(model)
        with torch.autocast(batch.input_ids.device.type, self.compute, enabled=self.compute in _HALF):
            hidden = valid_hidden(parts.trunk, batch)
        return logit_blocks(hidden, parts, size, self.compute)

    def _taken(self, logits: Tensor, labels: Tensor, kept: Tensor | None, *, entropy: bool = False) -> Taken:
        scores = logits[:, : self.vocabulary]
        return taken_logprobs(scores, labels, temperature=self.temperature, kept=kept, entropy=entropy)

    def _of_teacher(self, signal: TeacherSignal, labels: Tensor, kept: Tensor | None) -> Tensor:
        if isinstance(signal, Dense):
            return self._taken(upcast(signal.logits), labels, kept).logprobs
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

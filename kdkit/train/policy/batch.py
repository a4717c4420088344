"""Completions of a micro-batch, in the order of its learned tokens however its rows are laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdkit.api.data import PolicyLossInputs, TokenBatch
from kdkit.api.errors import ConformanceError
from kdkit.models.chat import Encoded
from kdkit.train.policy.rows import OPTIONAL, KeptIds, PolicyRow, all_have, sequence_count, token_count

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PolicyBatch", "Support", "policy_batch"]


@dataclass(frozen=True, slots=True)
class Support:
    """The ids that may be taken at every one of N tokens, laid end to end.

    Attributes:
        ids: [M] int32 ids of all tokens.
        starts: [N + 1] int64 where the ids of a token start, and M.
    """

    ids: Tensor
    starts: Tensor

    @classmethod
    def of(cls, rows: Sequence[PolicyRow]) -> Support:
        """The supports of all learned tokens of the rows.

        Raises:
            ConformanceError: A row has none, or a token was taken that is not in its own support.
        """
        kept = [row.support or KeptIds.of(()) for row in rows]
        labels = np.asarray([i for row in rows for i, learned in zip(row.ids, row.learned, strict=True) if learned])
        sizes, ids = np.concatenate([np.diff(k.offsets) for k in kept]), np.concatenate([k.ids for k in kept])
        tokens = np.repeat(np.arange(len(sizes)), sizes)
        if len(sizes) != len(labels) or len(np.unique(tokens[ids == labels[tokens]])) != len(labels):
            raise ConformanceError("a completion has a token outside the support it was sampled from")
        starts = np.concatenate([[0], np.cumsum(sizes)])
        return cls(torch.from_numpy(ids), torch.from_numpy(starts))

    def kept(self, start: int, stop: int, width: int, device: torch.device) -> Tensor:
        """Which of the ``width`` leading ids tokens ``start`` to ``stop`` may be: [stop - start, width] bool."""
        starts = self.starts[start : stop + 1]
        tokens = torch.repeat_interleave(torch.arange(stop - start), starts.diff())
        mask = torch.zeros(stop - start, width, dtype=torch.bool, device=device)
        mask[tokens.to(device), self.ids[starts[0] : starts[-1]].to(device, torch.int64)] = True
        return mask


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """B completions with N tokens in all; T is the longest. Everything stays on the CPU until a loss asks.

    Attributes:
        lengths: [B] int64 tokens of every completion.
        counts: [B] bool, whether a completion counts.
        values: [N] float64 by the names of the fields of ``PolicyRow``, those that the rows have.
        groups: [B] int64 which prompt.
        temperature: What the completions were sampled at.
        support: What the tokens could have been; None for the whole vocabulary.
        tokens: Tokens that count.
        sequences: Completions that count.
    """

    lengths: Tensor
    counts: Tensor
    values: dict[str, Tensor]
    groups: Tensor
    temperature: float
    support: Support | None
    tokens: int
    sequences: int

    @property
    def weights(self) -> Tensor | None:
        """[N] factors of token losses: 0 in completions that do not count. None when all are 1."""
        given = self.values.get("token_weights")
        if given is None and bool(self.counts.all()):
            return None
        counts = self.counts.repeat_interleave(self.lengths)
        return counts.double() if given is None else torch.where(counts, given, torch.zeros_like(given))

    def padded(self, flat: Tensor, fill: float = 0.0) -> Tensor:
        """[N] values of all tokens as [B, T], completion by completion, filled on the right."""
        real = self._real().to(flat.device)
        return torch.full(real.shape, fill, dtype=flat.dtype, device=flat.device).masked_scatter(real, flat)

    def flat(self, padded: Tensor) -> Tensor:
        """[N] values of the tokens of [B, T]."""
        return padded[self._real().to(padded.device)]

    def inputs(self, logprobs: Tensor, entropy: Tensor | None, labels: Tensor) -> PolicyLossInputs:
        """What a policy loss sees.

        Args:
            logprobs: [B, T] of the taken tokens under the current policy.
            entropy: [B, T] of the current policy.
            labels: [N] the taken tokens.
        """

        def move(name: str, fill: float = 0.0) -> Any:
            flat = self.values.get(name)
            return None if flat is None else self.padded(flat.to(logprobs.device, logprobs.dtype), fill)

        return PolicyLossInputs(
            logprobs=logprobs,
            old_logprobs=move("old_logprobs"),
            advantages=move("advantages"),
            mask=(self._real() & self.counts[:, None]).to(logprobs.device),
            completion_ids=self.padded(labels),
            lengths=self.lengths.to(logprobs.device),
            group_ids=self.groups.to(logprobs.device),
            ref_logprobs=move("ref_logprobs"),
            teacher_logprobs=move("teacher_logprobs"),
            # The neutral value: a loss may take its logarithm.
            importance_weights=move("importance_weights", 1.0),
            entropy=entropy,
        )

    def _real(self) -> Tensor:
        return torch.arange(int(self.lengths.max())) < self.lengths[:, None]


def policy_batch(
    rows: Sequence[PolicyRow], lay: Callable[[Sequence[Encoded]], TokenBatch], temperature: float
) -> tuple[TokenBatch, PolicyBatch]:
    """The student's batch, and the completions in the order of its learned tokens.

    Args:
        rows: Rows of a micro-batch.
        lay: Makes a batch of rows, in an order of its choice.
        temperature: What the completions were sampled at.

    Raises:
        ConformanceError: Some rows have a field that others lack.
    """
    # Ids may be equal, several completions of one prompt have the same; the order is told by numbers.
    batch = lay([Encoded(str(place), row.ids, row.learned) for place, row in enumerate(rows)])
    ordered = [rows[int(place)] for place in batch.example_ids]
    names = ["old_logprobs", "advantages", *(name for name in OPTIONAL if all_have(name, ordered))]
    values = {
        name: torch.tensor([value for row in ordered for value in getattr(row, name)], dtype=torch.float64)
        for name in names
    }
    policy = PolicyBatch(
        lengths=torch.tensor([row.targets for row in ordered]),
        counts=torch.tensor([row.counts for row in ordered]),
        values=values,
        groups=torch.tensor([row.group for row in ordered]),
        temperature=temperature,
        support=Support.of(ordered) if all_have("support", ordered) else None,
        tokens=token_count(ordered),
        sequences=sequence_count(ordered),
    )
    return replace(batch, example_ids=tuple(row.id for row in ordered)), policy

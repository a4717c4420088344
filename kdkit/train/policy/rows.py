"""A completion of the student's as a training row, with what was known when it was sampled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kdkit.api.errors import ConformanceError
from kdkit.models.chat import Encoded

__all__ = ["OPTIONAL", "PolicyRow", "sequence_count", "token_count"]

OPTIONAL: Final = ("teacher_logprobs", "ref_logprobs", "importance_weights", "token_weights")
"""Values per token that a row may lack; all rows of a training have the same ones."""


@dataclass(frozen=True, slots=True)
class PolicyRow(Encoded):
    """Prompt and completion; the completion's tokens, its end token included, are the learned ones.

    Everything per token has one entry for each learned token, in order. Log-probabilities are at the temperature of the
    sampling, and over ``support`` where there is one.

    Attributes:
        old_logprobs: Of the taken tokens under the policy that sampled, from the training forward.
        advantages: Per token.
        group: Number of the prompt; completions of one prompt share it.
        teacher_logprobs: Of the taken tokens under the teacher.
        ref_logprobs: Of the taken tokens under a frozen reference.
        importance_weights: Correction for sampling from another distribution.
        token_weights: Factors of what the token losses of the same stream give.
        support: Ids that top-k and top-p of the policy that sampled kept; None for the whole vocabulary.
        counts: Whether anything is learned from it. If not, no denominator counts it either.

    Raises:
        ConformanceError: Nothing is learned, or the entries of a field are not as many as the learned tokens.
    """

    old_logprobs: tuple[float, ...]
    advantages: tuple[float, ...]
    group: int
    teacher_logprobs: tuple[float, ...] | None = None
    ref_logprobs: tuple[float, ...] | None = None
    importance_weights: tuple[float, ...] | None = None
    token_weights: tuple[float, ...] | None = None
    support: tuple[tuple[int, ...], ...] | None = None
    counts: bool = True

    def __post_init__(self) -> None:
        # A value that is one token off would train the wrong thing in silence.
        if not self.targets:
            raise ConformanceError("a completion has no learned token", where=f"row {self.id}")
        for name in ("old_logprobs", "advantages", *OPTIONAL, "support"):
            values = getattr(self, name)
            if values is not None and len(values) != self.targets:
                raise ConformanceError(
                    f"{name} has {len(values)} entries for {self.targets} learned tokens", where=f"row {self.id}"
                )


def token_count(rows: Iterable[Encoded]) -> int:
    """Learned tokens of all rows that count."""
    return sum(row.targets for row in rows if not isinstance(row, PolicyRow) or row.counts)


def sequence_count(rows: Iterable[Encoded]) -> int:
    """Completions that count; rows of data are none."""
    return sum(row.counts for row in rows if isinstance(row, PolicyRow))

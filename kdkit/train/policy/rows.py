"""A completion of the student's as a training row, with what was known when it was sampled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kdkit.api.errors import ConformanceError
from kdkit.models.chat import Encoded

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["OPTIONAL", "KeptIds", "PolicyRow", "all_have", "sequence_count", "token_count"]

OPTIONAL: Final = ("teacher_logprobs", "ref_logprobs", "importance_weights", "token_weights")
"""Values per token that a row may lack; all rows of a training have the same ones."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptIds:
    """The ids that may be taken at every token of a completion, in 4 bytes each.

    Attributes:
        ids: [M] int32 ids of all tokens, end to end.
        offsets: [tokens + 1] int64 where the ids of a token start, and M.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, kept: Sequence[Sequence[int] | NDArray[np.int32]]) -> KeptIds:
        """From the ids of every token."""
        parts = [np.asarray(ids, dtype=np.int32) for ids in kept]
        sizes = np.asarray([len(ids) for ids in parts], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.int32), *parts]), np.concatenate([[0], np.cumsum(sizes)]))

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.offsets) - 1

    def __getitem__(self, token: int) -> NDArray[np.int32]:
        """The ids of a token."""
        place = range(len(self))[token]
        return self.ids[self.offsets[place] : self.offsets[place + 1]]

    def __eq__(self, other: object) -> bool:
        """Whether the ids are the same."""
        if not isinstance(other, KeptIds):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.ids, other.ids)

    def __hash__(self) -> int:
        return hash((self.ids.tobytes(), self.offsets.tobytes()))


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
    support: KeptIds | None = None
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


def all_have(name: str, rows: Sequence[PolicyRow]) -> bool:
    """Whether the rows have an optional field; None must not silently stand for a value.

    Raises:
        ConformanceError: Some rows have it, others lack it.
    """
    have = {getattr(row, name) is not None for row in rows}
    if len(have) > 1:
        raise ConformanceError(f"some completions have {name}, others do not")
    return have == {True}

"""Streams of rows: what an optimiser step learns from, by which losses.

A step takes a batch from every stream and adds up their gradients. Supervised and distilled training have one stream,
of data; policy training has one of the student's own completions, and may have one of data beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from kdkit.api.data import TokenBatch
from kdkit.train.aligned import AlignedSignals, aligned_batch
from kdkit.train.alignment import aligned_rows, group_count
from kdkit.train.batching import DataOrder
from kdkit.train.policy.batch import PolicyBatch, policy_batch
from kdkit.train.policy.rows import PolicyRow, sequence_count, token_count

if TYPE_CHECKING:
    from kdkit.api import TeacherSignals
    from kdkit.models.chat import Encoded
    from kdkit.train.checkpoint import State
    from kdkit.train.objective import LossTerm
    from kdkit.train.on_policy import OnPolicy

__all__ = ["Counts", "DataRows", "Inputs", "RowSource", "Share", "Stream"]


@dataclass(frozen=True, slots=True)
class Share:
    """Which rows of a step's batch are this rank's: every ``world``-th one from ``rank`` on."""

    batch: int
    rank: int = 0
    world: int = 1

    @property
    def places(self) -> range:
        """Where they stand among all rows of the step."""
        return range(self.rank, self.batch, self.world)


class RowSource(Protocol):
    """Where the rows of a step come from."""

    @property
    def size(self) -> int:
        """Rows of one epoch, on all ranks together."""

    def rows(self, step: int, share: Share, /) -> list[Encoded]:
        """This rank's rows of the optimiser step with index ``step`` (from 0)."""

    def metrics(self, all_ranks: Callable[[int], int], /) -> dict[str, float]:
        """What happened since the last call; ``all_ranks`` sums a count over ranks."""

    def state(self, step: int, share: Share, /) -> State | None:
        """What ``rows`` of ``step`` and later needs and cannot make again."""

    def restore(self, state: State | None, step: int, share: Share, /) -> None:
        """Take back what ``state`` gave for the same step."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """A micro-batch: the student's tokens, the teacher's view of them or of the same text, and whose they are."""

    batch: TokenBatch
    signals: TeacherSignals | AlignedSignals | None
    policy: PolicyBatch | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """Rows and the losses they are learned by, with denominators of their own.

    Attributes:
        terms: Weighted losses; no two losses of a task have the same name.
        source: Where the rows come from.
        signals: The teacher's view of a batch, when a loss needs it: a batch of the student's tokens, or with an
            aligned loss of the teacher's own.
        temperature: Of the sampling, for policy losses.
    """

    terms: Sequence[LossTerm]
    source: RowSource
    signals: Callable[[TokenBatch], TeacherSignals] | None = None
    temperature: float = 1.0

    def inputs(self, part: Sequence[Encoded], lay: Callable[[Sequence[Encoded]], TokenBatch]) -> Inputs:
        """A micro-batch as the objective sees it.

        Args:
            part: Its rows.
            lay: Makes a batch of rows, in an order of its choice.
        """
        if self.signals is not None and any(term.kind == "aligned" for term in self.terms):
            return Inputs(*aligned_batch(aligned_rows(part), lay, self.signals))
        if isinstance(part[0], PolicyRow):
            batch, policy = policy_batch(cast("Sequence[PolicyRow]", part), lay, self.temperature)
        else:
            batch, policy = lay(part), None
        return Inputs(batch, None if self.signals is None else self.signals(batch), policy)


@dataclass(frozen=True, slots=True)
class Counts:
    """What the losses of a stream are divided by."""

    tokens: int
    groups: int
    sequences: int

    @classmethod
    def of(cls, rows: Sequence[Encoded], all_ranks: Callable[[int], int]) -> Counts:
        """Those of the rows of all ranks; ``all_ranks`` sums a count over them."""
        return cls(*(all_ranks(count(rows)) for count in (token_count, group_count, sequence_count)))

    def scales(self, world: int) -> tuple[float, float, float]:
        """What sums over tokens, groups and sequences are multiplied by; ranks are averaged under DDP."""
        return world / max(self.tokens, 1), world / max(self.groups, 1), world / max(self.sequences, 1)


class DataRows:
    """Rows of one dataset, or of a weighted mixture of several, in an endless seeded order.

    Args:
        data: Encoded rows of each dataset.
        weights: Their relative weights.
        seed: Seed of the order.
        on_policy: Replaces answers of the data by the student's own.
    """

    def __init__(
        self,
        data: Sequence[Sequence[Encoded]],
        weights: Sequence[float],
        seed: int,
        on_policy: OnPolicy | None = None,
    ) -> None:
        self.data, self.weights, self._on_policy = data, tuple(weights), on_policy
        self._order = DataOrder([len(rows) for rows in data], weights, seed)

    @property
    def size(self) -> int:
        """Rows of all datasets together."""
        return self._order.rows

    def rows(self, step: int, share: Share, /) -> list[Encoded]:
        """This rank's rows of a step, as they are learned."""
        of_step = self._order.rows_of_step(step, share.batch)
        rows = [self.data[dataset][row] for dataset, row in (of_step[place] for place in share.places)]
        return rows if self._on_policy is None else self._on_policy.rows(step, rows, share.places)

    def metrics(self, all_ranks: Callable[[int], int], /) -> dict[str, float]:
        """What the student's own answers were like; nothing without them."""
        return {} if self._on_policy is None else self._on_policy.metrics(all_ranks)

    def state(self, step: int, share: Share, /) -> None:
        """Nothing: the rows of a step are a function of its number."""

    def restore(self, state: State | None, step: int, share: Share, /) -> None:
        """Nothing to take back."""

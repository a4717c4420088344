"""What a teacher has to be for losses that compare hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kdkit.api.protocols import TeacherSignals

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.api.data import TokenBatch

__all__ = ["HiddenSignals", "HiddenTeacher"]


class HiddenSignals(TeacherSignals, Protocol):
    """Signals with hidden states of the same valid tokens."""

    def hidden(self, layers: Sequence[int], /) -> tuple[Tensor, ...]:
        """[N, D] each, in the order of ``layers``, a part of those asked for; no gradient."""


@runtime_checkable
class HiddenTeacher(Protocol):
    """A teacher that gives hidden states for representation losses (``TeacherSpec.gives``: ``hidden``)."""

    @property
    def hidden_sizes(self) -> Sequence[int]:
        """Width of each hidden state that can be asked for: the embedding, then every layer, the last one normed."""

    def signals(self, batch: TokenBatch, /, *, layers: Sequence[int] = ()) -> HiddenSignals:
        """Signals for the valid tokens of a batch, with the hidden states of these layers and no others."""

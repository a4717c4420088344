"""What the student learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdkit.api import ConformanceError, Dense

if TYPE_CHECKING:
    from kdkit.api import Completion, Example, Sampling, Teacher, TeacherSignals, TokenBatch


class AcmeTeacher:
    """Another teacher, sharpened.

    Args:
        teacher: The teacher behind it; it is closed with this one.
        sharpness: Its logits are multiplied by this.
    """

    def __init__(self, teacher: Teacher, sharpness: float) -> None:
        self._teacher = teacher
        self._sharpness = sharpness

    @property
    def vocabulary(self) -> Any:
        """The tokens that its logits are about; kdkit refuses a student with others."""
        return self._teacher.vocabulary

    def signals(self, batch: TokenBatch, /) -> TeacherSignals:
        """What it thinks of the learned tokens of a batch."""
        return _Sharpened(self._teacher.signals(batch), self._sharpness)

    def generate(
        self,
        prompts: Sequence[Example],
        sampling: Sampling,
        seed: int,
        /,
    ) -> Sequence[Completion]:
        """Answers of the teacher behind it; what it says itself is not sharpened."""
        return self._teacher.generate(prompts, sampling, seed)

    def close(self) -> None:
        """Give back what the teacher behind it holds."""
        self._teacher.close()


class _Sharpened:
    def __init__(self, signals: TeacherSignals, sharpness: float) -> None:
        self._signals = signals
        self._sharpness = sharpness

    def block(self, start: int, stop: int, /) -> Dense:
        """Logits [stop - start, V] of learned tokens; called for one block after the other."""
        signal = self._signals.block(start, stop)
        if not isinstance(signal, Dense):
            raise ConformanceError("the teacher behind it gives no logits of all tokens")
        return Dense(signal.logits * self._sharpness)

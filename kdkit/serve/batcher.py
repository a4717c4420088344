"""One thread that owns the model, and a queue in front of it: requests that come together are computed together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from kdkit.api.errors import KdkitError, StageError
from kdkit.serve.limits import Limits

if TYPE_CHECKING:
    from kdkit.api import Completion, Sampling
    from kdkit.serve.model import Scored, ServedModel

__all__ = ["AnswerJob", "Batcher", "ScoreJob"]

_LINGER_SECONDS: Final = 0.005
"""How long the first request of a batch waits for others."""

_BREAKS: Final = (KdkitError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError,
                  RuntimeError, TypeError, ValueError)  # fmt: skip
"""What a model raises on input that it cannot take: its clients are told, and the server goes on."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoreJob:
    """Log-probabilities of one prompt, k per token."""

    ids: tuple[int, ...]
    k: int
    result: Future[Scored] = field(default_factory=Future)

    def joins(self, other: Job) -> bool:
        """Whether both can be computed in one batch."""
        return isinstance(other, ScoreJob)


@dataclass(frozen=True, slots=True, eq=False)
class AnswerJob:
    """An answer to one prompt."""

    ids: tuple[int, ...]
    sampling: Sampling
    seed: int
    result: Future[Completion] = field(default_factory=Future)

    def joins(self, other: Job) -> bool:
        """Whether both can be decoded in one batch."""
        return isinstance(other, AnswerJob) and other.sampling == self.sampling


Job: TypeAlias = ScoreJob | AnswerJob


class Batcher:
    """Computes jobs in batches, in a thread of its own.

    Args:
        model: What computes; only the thread touches it.
        limits: Rows and tokens of a batch.
    """

    def __init__(self, model: ServedModel, limits: Limits) -> None:
        self._model = model
        self._limits = limits
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="kdkit-serve", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs; their futures get the results."""
        with self._changed:
            if self._closed:
                for job in jobs:
                    job.result.cancel()
            self._waiting.extend(job for job in jobs if not job.result.cancelled())
            self._changed.notify()

    def close(self, timeout: float | None = None) -> bool:
        """Drop what waits and end the thread after its batch; whether it ended within ``timeout`` seconds."""
        with self._changed:
            self._closed = True
            while self._waiting:
                self._waiting.popleft().result.cancel()
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while batch := self._next():
            self._compute(batch)

    def _next(self) -> list[Job]:
        """The jobs of the next batch, the oldest first; none when closed."""
        batch: list[Job] = []
        with self._changed:
            while not batch and not self._closed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                # Others that were sent at the same time arrive now.
                self._changed.wait_for(lambda: self._closed, timeout=_LINGER_SECONDS)
                batch = self._take()
        return batch

    def _take(self) -> list[Job]:
        """The oldest job and those that join it; jobs that nobody waits for any more are dropped."""
        batch: list[Job] = []
        left: deque[Job] = deque()
        tokens = 0
        while self._waiting:
            job = self._waiting.popleft()
            fits = len(batch) < self._limits.batch_rows and tokens + len(job.ids) <= self._limits.batch_tokens
            if not batch or (fits and batch[0].joins(job)):
                if job.result.set_running_or_notify_cancel():
                    batch.append(job)
                    tokens += len(job.ids)
            else:
                left.append(job)
        self._waiting = left
        return batch

    def _compute(self, batch: list[Job]) -> None:
        try:
            results = self._results(batch)
        except _BREAKS as error:
            problem = error if isinstance(error, KdkitError) else StageError(type(error).__name__)
            problem.__cause__ = None if problem is error else error
            for job in batch:
                job.result.set_exception(problem)
            return
        for job, result in zip(batch, results, strict=True):
            job.result.set_result(result)

    def _results(self, batch: list[Job]) -> Sequence[Any]:
        prompts = [job.ids for job in batch]
        scores = [job for job in batch if isinstance(job, ScoreJob)]
        if scores:
            scored: Sequence[Scored] = self._model.score(prompts, max(job.k for job in scores))
            return scored
        answers = [job for job in batch if isinstance(job, AnswerJob)]
        seeds = [job.seed for job in answers]
        return self._model.answer(prompts, answers[0].sampling, seeds, self._limits.batch_rows)

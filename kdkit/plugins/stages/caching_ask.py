"""Asking a teacher about rows, and measuring what is lost of its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdkit.api.data import Dense
from kdkit.api.errors import ConformanceError
from kdkit.models.heads import split
from kdkit.train.batching import collate, micro_batches
from kdkit.train.objective import block_tokens, valid_hidden
from kdkit.train.packing import pack
from kdkit.train.signal_cache.encode import decode_row, encode_row, join
from kdkit.train.signal_cache.measure import Loss, measure
from kdkit.train.signal_cache.rows import Row, rows_of
from kdkit.train.signal_cache.select import UnfitTokenError
from kdkit.train.signal_cache.store import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdkit.api import Teacher, TokenBatch
    from kdkit.api.data import TeacherSignal
    from kdkit.models.chat import Encoded
    from kdkit.train.signal_cache.encode import Kept
    from kdkit.train.signal_cache.ids import IdCode
    from kdkit.train.signal_cache.select import Rule

__all__ = ["Questions"]


@dataclass(frozen=True, slots=True)
class Questions:
    """How a teacher is asked.

    Attributes:
        teacher: Who is asked.
        rule: What is kept.
        size: Rows of one forward pass.
        device: Where batches go.
    """

    teacher: Teacher
    rule: Rule
    size: int
    device: str

    def ask(self, rows: Sequence[Encoded]) -> Iterator[Entry]:
        """What is kept of each row, in any order, a forward pass at a time.

        Raises:
            ConformanceError: What the teacher says about a row is no distribution.
        """
        for part in micro_batches(rows, self.size):
            batch = pack(part, device=self.device)
            docs, signals = rows_of(batch), self.teacher.signals(batch)
            spans = self._spans(sum(doc.tokens for doc in docs))
            kept, start = join([self._keep(signals.block(*span), docs, span[0]) for span in spans]), 0
            for doc in docs:
                yield Entry(doc, kept.part(start, start + doc.tokens))
                start += doc.tokens

    @torch.no_grad()
    def measure(
        self, rows: Sequence[Encoded], model: PreTrainedModel, code: IdCode, log: Callable[[str], None]
    ) -> dict[str, float]:
        """Error and k on these rows; only k for a teacher that gives no logits. All values are finite.

        Args:
            rows: Rows that the code was not made from.
            model: The student.
            code: Of the ids.
            log: Told of values that are not finite.
        """
        total, sizes, rule = Loss(), [], self.rule
        for part in micro_batches(rows, self.size):
            batch = collate(part, device=self.device)
            docs, signals, logits = rows_of(batch), self.teacher.signals(batch), _Logits(model, batch)
            for start, stop in self._spans(logits.tokens):
                signal = signals.block(start, stop)
                kept = self._keep(signal, docs, start)
                sizes.append(kept.k)
                if isinstance(signal, Dense):
                    read = decode_row(encode_row(kept, code, rule.bits), kept.tokens, code)
                    dense = signal.logits[:, : rule.vocabulary].float()
                    measure(total, dense, logits.block(start, stop)[:, : rule.vocabulary], read, rule.temperature)
        k = np.concatenate(sizes)
        facts = {"measured_rows": float(len(rows)), "measured_tokens": float(len(k)), "mean_k": float(k.mean())}
        facts |= total.values() if total.tokens else {}
        lost = [name for name, value in facts.items() if not math.isfinite(value)]
        if lost:
            log(f"{', '.join(lost)} not finite, and left out: look at the student's logits")
        return {name: value for name, value in facts.items() if name not in lost}

    def _keep(self, signal: TeacherSignal, docs: Sequence[Row], start: int) -> Kept:
        try:
            kept: Kept = self.rule.keep(signal)
        except UnfitTokenError as error:
            ends = np.cumsum([doc.tokens for doc in docs])
            owner = int(np.searchsorted(ends, start + error.token, side="right"))
            place = start + error.token - int(ends[owner]) + docs[owner].tokens
            hint = "nothing of it is kept; leave the row out, or use a teacher or precision that can answer it"
            raise ConformanceError(
                f"{error.what} for its learned token {place}", where=f"row {docs[owner].id!r}", hint=hint
            ) from error
        return kept

    def _spans(self, tokens: int) -> Iterator[tuple[int, int]]:
        size = block_tokens(self.rule.vocabulary)
        for start in range(0, tokens, size):
            yield start, min(tokens, start + size)


class _Logits:
    """The student's logits of a padded batch, a block at a time."""

    def __init__(self, model: PreTrainedModel, batch: TokenBatch) -> None:
        self._parts = split(model)
        self._hidden = valid_hidden(self._parts.trunk, batch)
        self.tokens = len(self._hidden)

    def block(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, V] float32."""
        return self._parts.project(self._hidden[start:stop]).float()

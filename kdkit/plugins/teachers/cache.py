"""A teacher read from disk, a row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdkit.api.errors import ConformanceError, DataError
from kdkit.models.load import Vocabulary
from kdkit.train.signal_cache.encode import Kept, join
from kdkit.train.signal_cache.identity import check_student, check_weights
from kdkit.train.signal_cache.rows import Row, row_hash, rows_of
from kdkit.train.signal_cache.select import as_topk
from kdkit.train.signal_cache.store import Reader

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from kdkit.api import BuildContext, Completion, Example, Sampling, TokenBatch, TopK
    from kdkit.models.chat import Encoded
    from kdkit.plugins.teachers.plugin import CacheTeacherParams

__all__ = ["CacheTeacher"]


@dataclass(frozen=True, slots=True)
class _KeptSignals:
    """What is kept for all valid tokens of a batch."""

    kept: Kept
    temperature: float
    device: torch.device

    def block(self, start: int, stop: int, /) -> TopK:
        """[stop - start, largest k of the block]."""
        return as_topk(self.kept.part(start, stop), self.temperature, self.device)


class CacheTeacher:
    """See :class:`kdkit.api.Teacher` and :class:`kdkit.api.RowTeacher`."""

    def __init__(self, params: CacheTeacherParams, ctx: BuildContext) -> None:
        self._path = ctx.resolve(params.cache).path
        self._reader = Reader(self._path)
        about = self._about = self._reader.description
        if params.model is not None:
            check_weights(about, ctx.resolve(params.model), str(self._path))
        made = about.vocabulary
        # Entries beyond the width were never compared: for training, the teacher has no more than that.
        self.vocabulary = Vocabulary(size=made.width, tokens=made.tokens, fingerprint=made.fingerprint)
        self.temperature = about.rule.temperature
        whose = f"{about.teacher.name!r} (fingerprint {about.digest[:12]})"
        ctx.log(f"teacher cache of {whose} at temperature {self.temperature:g}, {about.totals.rows:,} rows")

    def check_student(self, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, /) -> None:
        """Refuse a student that the cache was not made for, and a code of ids that is not the cache's.

        Raises:
            DataError: One line that says what to do.
        """
        check_student(self._about, vocabulary, tokenizer, str(self._path))
        # Made now, when its width is known to be no larger than the student's.
        _ = self._reader.code

    def check_rows(self, rows: Sequence[Encoded], /) -> None:
        """Refuse every row that is not in the cache.

        Raises:
            DataError: One line with the first such row.
        """
        missing = [row for row in rows if self._reader.find(row_hash(row.ids, row.learned)) is None]
        if missing:
            raise self._unknown(missing[0].id, f"{len(missing)} of {len(rows)} rows have no signals; the first: ")

    def signals(self, batch: TokenBatch, /) -> _KeptSignals:
        """The rows of the batch, found by their tokens.

        Raises:
            DataError: A row is not in the cache, was rendered or cut in another way, or is damaged.
        """
        kept = join([self._read(row) for row in rows_of(batch)])
        return _KeptSignals(kept, self.temperature, batch.input_ids.device)

    def generate(self, prompts: Sequence[Example], sampling: Sampling, seed: int, /) -> Sequence[Completion]:
        """Never: a cache has no text."""
        del prompts, sampling, seed
        raise ConformanceError("a teacher cache writes no answers", hint="use the teacher it was made from")

    def close(self) -> None:
        """Forget the index."""
        self.__dict__.pop("_reader", None)

    def _read(self, row: Row) -> Kept:
        place = self._reader.find(row.hash)
        if place is None:
            raise self._unknown(row.id)
        kept = self._reader.read(place)
        if kept.tokens != row.tokens:
            what = f"row {row.id!r} has {row.tokens} learned tokens, the teacher cache {kept.tokens}"
            raise DataError(what, where=str(self._path))
        return kept

    def _unknown(self, example_id: str, count: str = "") -> DataError:
        known: Any = self._reader.knows(example_id)
        why = "is in the teacher cache with other tokens" if known else "is not in the teacher cache"
        hint = (
            "rows must be rendered and cut as they were: same template, max_length, overlong and data options"
            if known
            else "add its dataset to the data of the cache-teacher stage, which can extend this cache"
        )
        return DataError(f"{count}row {example_id!r} {why}", where=str(self._path), hint=hint)

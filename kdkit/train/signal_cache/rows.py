"""The rows of a batch by content: a cache answers for the tokens that were learned, whatever their row is called."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kdkit.api import TokenBatch

__all__ = ["Row", "id_hash", "row_hash", "rows_of"]


@dataclass(frozen=True, slots=True)
class Row:
    """A document of a batch: its example's id, the hash of its tokens, and how many are learned."""

    id: str
    hash: bytes
    tokens: int


def row_hash(ids: Sequence[int] | NDArray[Any], learned: Sequence[bool] | NDArray[Any]) -> bytes:
    """16 bytes for (token ids, which of them are learned); the first token is never learned."""
    marks = np.array(learned, dtype=bool)
    marks[:1] = False
    content = np.array(ids, dtype="<i4").tobytes() + np.packbits(marks).tobytes()
    return hashlib.blake2b(content, digest_size=16, person=b"kdkit row").digest()


def id_hash(example_id: str) -> bytes:
    """8 bytes for an example's id, which may be any text."""
    return hashlib.blake2b(example_id.encode("utf-8", "surrogatepass"), digest_size=8, person=b"kdkit id").digest()


def rows_of(batch: TokenBatch) -> list[Row]:
    """The documents with learned tokens, in the order of their learned tokens; ids are empty where the batch has none.

    Works for padded rows, on either side, and for rows laid end to end.
    """
    ids, learned = batch.input_ids.cpu().numpy(), batch.labels_mask.cpu().numpy()
    spans = _spans(batch)
    # Ids are for messages only; a batch whose ids do not fit its rows is served all the same.
    names = batch.example_ids if len(batch.example_ids) == len(spans) else ("",) * len(spans)
    found = []
    for name, (row, span) in zip(names, spans, strict=True):
        marks = learned[row, span]
        if marks.any():
            found.append(Row(name, row_hash(ids[row, span], marks), int(marks[1:].sum())))
    return found


def _spans(batch: TokenBatch) -> list[tuple[int, slice]]:
    """Row and columns of every document. Documents of one token only fill up packed rows."""
    if batch.attention_mask is not None:
        real = batch.attention_mask.cpu().numpy().astype(bool)
        first = real.argmax(axis=1)
        return [
            (row, slice(int(a), int(a + n))) for row, (a, n) in enumerate(zip(first, real.sum(axis=1), strict=True))
        ]
    width = batch.position_ids.shape[1]
    spans = []
    for row, positions in enumerate(batch.position_ids.cpu().numpy()):
        starts = np.flatnonzero(positions == 0).tolist()
        for start, stop in zip(starts, [*starts[1:], width], strict=True):
            if stop - start > 1:
                spans.append((row, slice(start, stop)))
    return spans

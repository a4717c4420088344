"""Rollouts as Parquet, one file an iteration, so that a person can read what was rewarded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from kdkit.api.errors import DataError, EnvironmentUnmet

__all__ = ["NOTE", "REWARD", "Record", "read_records", "write_records"]

REWARD: Final = "reward/"
"""What stands before the name of a reward in the column of its values."""
NOTE: Final = "note/"
"""The same for the column of what it says: a verdict, or why there is no value."""
_FIELDS: Final = {
    "iteration": pa.int32(),
    "step": pa.int64(),
    "group": pa.int32(),
    "sample": pa.int32(),
    "attempt": pa.int32(),
    "counts": pa.bool_(),
    "id": pa.string(),
    "prompt": pa.string(),
    "text": pa.string(),
    "tokens": pa.int32(),
    "truncated": pa.bool_(),
    "status": pa.string(),
    "reason": pa.string(),
    "total": pa.float64(),
    "advantage": pa.float64(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One completion with what the rewards said about it. The fields are the columns.

    Attributes:
        iteration: From 1.
        step: Optimiser steps that were done when it was sampled.
        group: Which prompt of the iteration; with ``sample`` and ``attempt`` it names the completion.
        sample: Which of the completions of the prompt.
        attempt: 0, or which try of the dynamic sampling made it.
        counts: Whether it is learned from. Completions that are masked, have no total, or whose group was replaced do
            not count.
        id: Of the row of the data.
        prompt: As the model reads it.
        text: The completion.
        tokens: Its length, the end token included.
        truncated: Whether it hit the limit.
        status: ``ok``, ``unscorable`` or ``infra-error``.
        reason: Why there is no total.
        total: Weighted sum of the rewards.
        advantage: Of every token; None when the group was replaced.
        rewards: Value of every reward that counted, by name (columns ``reward/NAME``).
        notes: What it said beside or instead of the value (columns ``note/NAME``).
    """

    iteration: int
    step: int
    group: int
    sample: int
    attempt: int
    counts: bool
    id: str
    prompt: str
    text: str
    tokens: int
    truncated: bool
    status: str
    reason: str | None
    total: float | None
    advantage: float | None
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    notes: Mapping[str, str | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as plain data."""
        return {name: getattr(self, name) for name in _FIELDS} | {
            "rewards": dict(self.rewards),
            "notes": {name: note for name, note in self.notes.items() if note},
        }


def write_records(root: Path, records: Sequence[Record]) -> Path:
    """Write the records of an iteration below ``root``, whole or not at all. An older file of it is replaced.

    Raises:
        EnvironmentUnmet: The disk is full, or the directory cannot be written.
    """
    columns = {name: pa.array([_clean(getattr(record, name)) for record in records], t) for name, t in _FIELDS.items()}
    for name in dict.fromkeys(name for record in records for name in record.rewards):
        columns[REWARD + name] = pa.array([record.rewards.get(name) for record in records], pa.float64())
        columns[NOTE + name] = pa.array([_clean(record.notes.get(name)) for record in records], pa.string())
    final = root / f"iteration-{records[0].iteration:06d}.parquet"
    temporary = final.with_name(f".tmp-{final.name}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), temporary, compression="zstd")
        temporary.replace(final)
    except OSError as error:
        raise EnvironmentUnmet(f"rollouts cannot be written: {error}", where=str(final)) from error
    return final


def read_records(root: Path) -> Iterator[Record]:
    """All records below ``root``, iteration by iteration.

    Raises:
        DataError: A file is no Parquet file, or not one of rollouts.
    """
    for path in sorted(root.glob("iteration-*.parquet")):
        try:
            rows = pq.read_table(path).to_pylist()
            records = [_record(row) for row in rows]
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DataError(f"cannot be read as rollouts: {error}", where=str(path)) from error
        yield from records


def _record(row: Mapping[str, Any]) -> Record:
    names = [column.removeprefix(REWARD) for column in row if column.startswith(REWARD)]
    # In one iteration all completions have the same rewards.
    return Record(
        **{name: row[name] for name in _FIELDS},
        rewards={name: row[REWARD + name] for name in names},
        notes={name: row[NOTE + name] for name in names},
    )


def _clean(value: Any) -> Any:
    """Half of a character cannot be stored."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

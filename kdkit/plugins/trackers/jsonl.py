"""Metrics as JSON Lines: ``{"time": ..., "stage": ..., "step": ..., "metrics": {...}}``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from kdkit.api.errors import EnvironmentUnmet
from kdkit.api.protocols import RunInfo

__all__ = ["JsonlTracker"]


class JsonlTracker:
    """Appends to ``metrics.jsonl``; all stages of a run share the file, in whatever order or process they run."""

    def __init__(self, run: RunInfo) -> None:
        self._file = run.run_dir / "metrics.jsonl"
        self._stage = run.stage
        self._torn = _ends_torn(self._file)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line; NaN and infinity become null, which JSON has no numbers for.

        Raises:
            EnvironmentUnmet: The file cannot be written.
        """
        row = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "stage": self._stage,
            "step": step,
            "metrics": {name: _finite(value) for name, value in metrics.items()},
        }
        line = json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
        self._append(("\n" + line if self._torn else line).encode())
        self._torn = False

    def artifact(self, path: Path) -> None:
        """Nothing to do: the file lies in the run's directory already."""

    def finish(self, status: Literal["ok", "failed", "stopped"]) -> None:
        """Nothing to do: each line is complete on disk when :meth:`log` returns."""

    def _append(self, line: bytes) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file in append mode: lines of several processes do not mix, and kill -9 loses none.
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                written = os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise EnvironmentUnmet(f"cannot be written: {error.strerror}", where=str(self._file)) from error
        if written < len(line):
            raise EnvironmentUnmet("cannot be written: the disk is full", where=str(self._file))


def _ends_torn(file: Path) -> bool:
    """Whether a crash of the machine left the last line without its end, so that the next would be glued to it."""
    try:
        with file.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) != b"\n"
    except OSError:
        # No file yet, or an empty one.
        return False


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None

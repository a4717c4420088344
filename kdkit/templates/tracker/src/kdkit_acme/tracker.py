"""Where the numbers of a run go."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from kdkit.api import EnvironmentUnmet

HEADER = ("stage", "step", "name", "value")


class AcmeTracker:
    """Appends to a table that all stages of a run share, each in a process of its own.

    Args:
        file: The table; made with the first numbers.
        stage: The stage's name in the recipe.
    """

    def __init__(self, file: Path, stage: str) -> None:
        self._file = file
        self._stage = stage

    def log(self, metrics: Mapping[str, float], step: int, /) -> None:
        """One line for every number; they are on the disk when this returns.

        Raises:
            EnvironmentUnmet: The file cannot be written.
        """
        lines: list[tuple[object, ...]] = [
            (self._stage, step, name, repr(float(value))) for name, value in metrics.items()
        ]
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file in append mode: lines of several processes do not mix.
            descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            with os.fdopen(descriptor, "wb", buffering=0) as stream:
                empty = os.fstat(descriptor).st_size == 0
                stream.write(_text([HEADER, *lines] if empty else lines))
        except OSError as error:
            why = f"cannot be written: {error.strerror}"
            raise EnvironmentUnmet(why, where=str(self._file)) from error

    def artifact(self, path: Path, /) -> None:
        """Nothing to do: the file lies in the run's directory already."""

    def finish(self, status: Literal["ok", "failed", "stopped"], /) -> None:
        """Nothing to do: every line is complete on the disk."""


def _text(rows: list[tuple[object, ...]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode("utf-8", "backslashreplace")

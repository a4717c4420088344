"""What happens in a run, as data: one object a line in ``events.jsonl``, and the same objects to whoever shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, Final, Literal, TypeAlias

from kdkit.engine.files import json_line

__all__ = ["Event", "EventLog", "EventType", "Sink", "utc_now"]

EventType: TypeAlias = Literal[
    "run-started", "stage-cached", "stage-started", "progress", "log", "stage-finished", "error", "run-finished"
]
"""Data of each: run-started ``run_dir, stages``; stage-cached ``key, why``; stage-started ``key, state, why``;
progress ``step, total`` and values such as ``loss``; log ``message``; stage-finished ``status, seconds, entry``;
error ``error, exit_code``; run-finished ``status, exit_code, seconds``."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; ``stage`` is empty for the run as a whole."""

    type: EventType
    stage: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


Sink: TypeAlias = Callable[[Event], None]


def utc_now() -> str:
    """The time as ISO 8601 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class EventLog:
    """Appends events to a file. Of the many progress events a few are enough there."""

    PROGRESS_SECONDS: Final = 10.0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next_progress = 0.0

    def __call__(self, event: Event) -> None:
        """Write one line; raises ``OSError``."""
        if event.type == "progress":
            if monotonic() < self._next_progress:
                return
            self._next_progress = monotonic() + self.PROGRESS_SECONDS
        line = json_line({"time": utc_now(), "stage": event.stage, "type": event.type, **event.data})
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

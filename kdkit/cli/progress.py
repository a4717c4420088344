"""What a person sees of a run: a live line on a terminal, otherwise a plain line now and then."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from time import monotonic
from types import TracebackType
from typing import Any, Final, Protocol, Self, TextIO

from kdkit.cli.output import safely, shown, wrapped
from kdkit.engine.events import Event
from kdkit.engine.plan import NEVER_RAN

__all__ = ["PlainView", "View", "make_view"]

_PLAIN_SECONDS: Final = 5.0
_NO_CURSOR: Final = frozenset({"dumb", "unknown"})
"""Terminal types on which rich draws no progress at all."""


class View(Protocol):
    """Shows events between enter and exit."""

    def show(self, event: Event) -> None:
        """Show one event; never raises because of the terminal."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_view(stages: Sequence[str], stream: TextIO) -> View:
    """The view that fits ``stream``; a terminal that cannot move its cursor gets plain lines, too."""
    width = max(map(len, stages), default=0)
    if not stream.isatty() or os.environ.get("TERM", "").lower() in _NO_CURSOR:
        return PlainView(width, stream)
    from kdkit.cli.live import LiveView

    return LiveView(width, stream)


class Pace:
    """Remaining time of a stage, from the steps seen so far; a resumed stage does not start at step 0."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def eta(self, step: int, total: int) -> str:
        """``1:05``, or empty while nothing is known and when nothing is left."""
        now = monotonic()
        if self._first is None or step < self._first[0]:
            self._first = (step, now)
        done, seconds = step - self._first[0], now - self._first[1]
        return clock(seconds / done * (total - step)) if done > 0 and step < total else ""


def clock(seconds: float) -> str:
    """``4.2 s``, ``3:05`` or ``2:03:05``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def values_text(data: Mapping[str, Any]) -> str:
    """``loss 1.234  tokens/s 5,200`` of a progress event."""
    shown = []
    for name, value in data.items():
        if name in {"step", "total"}:
            continue
        label = "tokens/s" if name == "tokens_per_s" else name
        number = isinstance(value, int | float) and math.isfinite(value)
        text = (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}") if number else str(value)
        shown.append(f"{label} {text}")
    return "  ".join(shown)


def sentence(event: Event) -> str:
    """One line for every event but progress; empty for those that need none."""
    data = event.data
    match event.type:
        case "run-started":
            return f"run {shown(data['run_dir'])}"
        case "stage-cached":
            return "cached"
        case "stage-started":
            word = "resumed" if data["state"] == "resume" else "started"
            return word if data["why"] in {"", NEVER_RAN} else f"{word} ({data['why']})"
        case "stage-finished":
            word = {"ok": "done in", "failed": "failed after", "stopped": "stopped after"}[data["status"]]
            return f"{word} {clock(data['seconds'])}"
        case "log":
            return str(data["message"])
        case _:
            return ""


def line_of(event: Event, width: int, text: str | None = None) -> str:
    """``text`` of an event, by default its :func:`sentence`, behind its stage's name in a column of ``width``."""
    text = sentence(event) if text is None else text
    return f"{event.stage:<{width}}  {text}" if event.stage and text else text


def _columns(stream: TextIO) -> int:
    """Width of a terminal; 0 for anything else, where a line stays a line."""
    if not stream.isatty():
        return 0
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except OSError:
        return 80


class PlainView:
    """One line per event, and one about progress every few seconds; on a terminal no word is cut."""

    def __init__(self, width: int, stream: TextIO) -> None:
        self._width = width
        self._stream = stream
        self._columns = _columns(stream)
        self._pace = Pace()
        self._last = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def show(self, event: Event) -> None:
        """Print the event's line, if it has one."""
        line = line_of(event, self._width, self._progress(event) if event.type == "progress" else None)
        if event.type == "stage-started":
            self._pace = Pace()
        if line:
            self._last = monotonic()
            text = wrapped(line, self._columns, self._width + 2) if self._columns else line
            safely(self._stream, lambda: print(text, file=self._stream))

    def _progress(self, event: Event) -> str:
        step, total = event.data["step"], event.data["total"]
        eta = self._pace.eta(step, total)
        if monotonic() - self._last < _PLAIN_SECONDS:
            return ""
        parts = (f"step {step}/{total}", values_text(event.data), eta and f"eta {eta}")
        return "  ".join(part for part in parts if part)

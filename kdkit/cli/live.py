"""Progress on a terminal: a line for each finished stage, and a bar that moves for the one at work."""

from __future__ import annotations

from types import TracebackType
from typing import Final, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from kdkit.cli.output import safely, wrapped
from kdkit.cli.progress import Pace, line_of, values_text
from kdkit.engine.events import Event

__all__ = ["LiveView"]

_STYLES: Final = {"stage-cached": "dim", "log": "dim", "stage-finished": "bold"}


class LiveView:
    """Shows events with rich; honours ``NO_COLOR``."""

    def __init__(self, width: int, stream: TextIO) -> None:
        self._width = width
        self._stream = stream
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=self._console,
            transient=True,
            redirect_stdout=False,
        )
        self._task: TaskID | None = None
        self._pace = Pace()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        safely(self._stream, self._progress.stop)

    def show(self, event: Event) -> None:
        """Draw the event."""
        safely(self._stream, lambda: self._draw(event))

    def _draw(self, event: Event) -> None:
        if event.type == "progress":
            self._move(event)
            return
        if event.type == "stage-finished" and self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.refresh()
            self._task = None
        if line := line_of(event, self._width):
            text = wrapped(line, self._console.width, self._width + 2)
            self._console.print(Text(text, style=_STYLES.get(event.type, "")), soft_wrap=True)
        if event.type == "stage-started":
            self._pace = Pace()
            self._task = self._progress.add_task(event.stage, total=None, text="")

    def _move(self, event: Event) -> None:
        if self._task is None:
            return
        step, total = event.data["step"], event.data["total"]
        eta = self._pace.eta(step, total)
        parts = (f"{step}/{total}", values_text(event.data), eta and f"eta {eta}")
        self._progress.update(self._task, completed=step, total=total, text="  ".join(part for part in parts if part))

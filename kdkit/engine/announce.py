"""Tells everyone what happens in a run: the event log, whoever shows progress, and plugins that listen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from kdkit.api.errors import ExitCode, KdkitError
from kdkit.api.hookspecs import RunFinished, StageFinished, StageStarted
from kdkit.engine.events import Event, EventType, Sink
from kdkit.engine.files import json_line
from kdkit.engine.redact import redact

if TYPE_CHECKING:
    from kdkit.engine.plan import PlannedStage
    from kdkit.recipe import Recipe

__all__ = ["Announcer", "Status"]

Status: TypeAlias = Literal["ok", "failed", "stopped"]


class Announcer:
    """One run's events."""

    def __init__(self, recipe: Recipe, run_dir: Path, sinks: Sequence[Sink]) -> None:
        self._recipe = recipe
        self._run_dir = run_dir
        self._sinks = sinks

    def send(self, event: Event) -> None:
        """Pass an event to every sink, secrets masked: what a stage says may quote a header or an address."""
        clean = Event(event.type, event.stage, json.loads(redact(json_line(event.data))))
        for sink in self._sinks:
            sink(clean)

    def log(self, message: str, stage: str = "") -> None:
        """One line for people."""
        self._emit("log", stage, message=message)

    def run_started(self, stages: Sequence[str]) -> None:
        """The run begins; ``stages`` are those it is about."""
        self._emit("run-started", run_dir=str(self._run_dir), recipe=self._recipe.name, stages=list(stages))

    def cached(self, planned: PlannedStage) -> None:
        """A stage's result is there already."""
        self._emit("stage-cached", planned.name, key=planned.key)

    def started(self, planned: PlannedStage, why: str, *, resumed: bool) -> None:
        """A stage begins."""
        state = "resume" if resumed else "run"
        self._emit("stage-started", planned.name, key=planned.key, state=state, why=why)
        self._notify(
            StageStarted(
                recipe=self._recipe.name,
                stage=planned.name,
                kind=planned.stage.found.spec.name,
                key=planned.key,
                run_dir=self._run_dir,
            )
        )

    def ended(self, planned: PlannedStage, status: Status, seconds: float, entry: Path | None) -> None:
        """A stage ended; ``entry`` is its store entry when it ended well."""
        where = str(entry) if entry else None
        self._emit("stage-finished", planned.name, status=status, seconds=round(seconds, 3), entry=where)
        self._notify(
            StageFinished(
                recipe=self._recipe.name,
                stage=planned.name,
                kind=planned.stage.found.spec.name,
                key=planned.key,
                run_dir=self._run_dir,
                status=status,
                seconds=seconds,
                entry=entry,
            )
        )

    def run_finished(self, status: Status, error: KdkitError | None, code: ExitCode, seconds: float) -> None:
        """The run ended."""
        if error is not None:
            self._emit("error", exit_code=int(code), error=error.to_json())
        self._notify(
            RunFinished(recipe=self._recipe.name, run_dir=self._run_dir, status=status, seconds=round(seconds, 3))
        )
        self._emit("run-finished", status=status, exit_code=int(code), seconds=round(seconds, 3))

    def _notify(self, event: StageStarted | StageFinished | RunFinished) -> None:
        for line in self._recipe.catalog.notify(event):
            self.log(f"plugin notification failed: {line}")

    def _emit(self, kind: EventType, name: str = "", /, **data: object) -> None:
        self.send(Event(kind, name, data))

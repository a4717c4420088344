"""Where a stage's numbers go: its own ``metrics.jsonl`` and the recipe's trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdkit.api.errors import KdkitError
from kdkit.api.protocols import RunInfo, Tracker
from kdkit.api.slots import Component, Found
from kdkit.engine.boundary import ComponentBoundary
from kdkit.engine.files import json_line, write_atomic

__all__ = ["MetricsFile", "Trackers"]


class MetricsFile:
    """``{"step": 10, "train/loss": 1.5}``, one object a line; ``"NaN"`` and ``"Infinity"`` are strings."""

    def __init__(self, path: Path, *, resumed: bool) -> None:
        self._path = path
        self._trim = resumed

    def append(self, values: Mapping[str, float], step: int) -> None:
        """Add one line; raises ``OSError``."""
        if self._trim:
            self._drop_from(step)
            self._trim = False
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json_line({"step": step, **values}) + "\n")

    def _drop_from(self, step: int) -> None:
        """Remove what was measured after the checkpoint: those steps are done, and written, again."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        kept = [line.decode() for line in lines if _step_of(line) < step]
        write_atomic(self._path, "".join(f"{line}\n" for line in kept))


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for one that a crash cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Trackers:
    """All trackers of a recipe, opened for one stage.

    A tracker that fails while the stage runs is reported once and closed: hours of training are worth more than its
    copy of the numbers, which are in ``metrics.jsonl`` anyway.
    """

    def __init__(self, components: Sequence[Component[Tracker]], info: RunInfo, log: Callable[[str], None]) -> None:
        self._log = log
        self._open: list[tuple[Found, Tracker]] = []
        for component in components:
            spec: Any = component.found.spec
            with ComponentBoundary(component.found):
                self._open.append((component.found, spec.build(component.params, info)))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand metrics to every tracker."""
        self._each(lambda tracker: tracker.log(values, step))

    def artifact(self, path: Path) -> None:
        """Hand a finished file or directory to every tracker."""
        self._each(lambda tracker: tracker.artifact(path))

    def finish(self, status: Literal["ok", "failed", "stopped"]) -> None:
        """Close every tracker."""
        self._each(lambda tracker: tracker.finish(status))
        self._open.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for found, tracker in list(self._open):
            try:
                with ComponentBoundary(found):
                    call(tracker)
            except KdkitError as error:
                self._log(f"tracker {found.qualified_name} failed and gets no more metrics: {error}")
                self._open.remove((found, tracker))

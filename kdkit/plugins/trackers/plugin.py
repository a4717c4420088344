"""The built-in trackers. Light: the implementations are imported when one is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdkit.api.hookspecs import hookimpl
from kdkit.api.params import Params
from kdkit.api.protocols import RunInfo, Tracker
from kdkit.api.specs import TrackerSpec

__all__ = ["JsonlTrackerParams", "TensorboardParams", "kdkit_trackers"]


class JsonlTrackerParams(Params):
    """No parameters: the file is ``metrics.jsonl`` in the run's directory."""


class TensorboardParams(Params):
    """No parameters: the files are below ``tensorboard/`` in the run's directory."""


def _jsonl(params: JsonlTrackerParams, run: RunInfo) -> Tracker:
    from kdkit.plugins.trackers.jsonl import JsonlTracker

    del params
    return JsonlTracker(run)


def _tensorboard(params: TensorboardParams, run: RunInfo) -> Tracker:
    from kdkit.plugins.trackers.tensorboard import TensorboardTracker

    del params
    return TensorboardTracker(run)


@hookimpl
def kdkit_trackers() -> Iterator[TrackerSpec[Any]]:
    """The built-in trackers."""
    yield TrackerSpec(
        name="jsonl",
        summary="metrics.jsonl in the run's directory: one line per stage and step",
        params=JsonlTrackerParams,
        build=_jsonl,
    )
    yield TrackerSpec(
        name="tensorboard",
        summary="TensorBoard event files in the run's directory",
        params=TensorboardParams,
        build=_tensorboard,
        extras=("tensorboard",),
    )

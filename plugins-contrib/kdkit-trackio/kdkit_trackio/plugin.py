"""What kdkit sees of this package. Light: neither trackio nor the tracker is imported before one is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from kdkit.api import Params, RunInfo, TrackerSpec, hookimpl

if TYPE_CHECKING:
    from kdkit.api import Tracker


class TrackioParams(Params):
    """Metrics of every stage in a trackio database on this machine: a run of trackio for each stage, grouped by run.

    `TRACKIO_DIR=DIRECTORY trackio show` opens the dashboard. Nothing is sent anywhere, whatever the environment says.
    """

    directory: str | None = Field(None, min_length=1)
    """Where the database lies; relative to where kdkit is started. Runs that share it can be compared. Left out, every
    run has its own: `trackio/` in the run's directory."""
    project: str | None = Field(None, min_length=1)
    """The project in the dashboard; the recipe's name unless given."""


def _build(params: TrackioParams, run: RunInfo) -> Tracker:
    from kdkit_trackio.tracker import TrackioTracker

    return TrackioTracker(params, run)


@hookimpl
def kdkit_trackers() -> Iterator[TrackerSpec[TrackioParams]]:
    """The tracker of this package."""
    yield TrackerSpec(
        name="trackio",
        summary="A local trackio database, with curves of several runs side by side",
        params=TrackioParams,
        build=_build,
    )

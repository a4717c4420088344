"""What kdkit reads of this package. Keep it light: what lists or checks components imports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdkit.api import Params, TrackerSpec, hookimpl
from pydantic import Field

if TYPE_CHECKING:
    from kdkit.api import RunInfo, Tracker


class AcmeParams(Params):
    """Numbers of a run as a table: stage, step, name, value."""

    file: str = Field("metrics.csv", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    """Name of the file in the run's directory."""


def _build(params: AcmeParams, run: RunInfo) -> Tracker:
    from kdkit_acme import tracker

    return tracker.AcmeTracker(run.run_dir / params.file, run.stage)


@hookimpl
def kdkit_trackers() -> Iterator[TrackerSpec[Any]]:
    """The trackers of this package."""
    yield TrackerSpec(
        name="acme",
        summary="metrics.csv in the run's directory: one line for every number",
        params=AcmeParams,
        build=_build,
    )

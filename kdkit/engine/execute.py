"""Runs one stage in this process. The worker process and inline stages share this one path."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdkit.api.artifacts import Artifact, ReportFiles
from kdkit.api.errors import ConformanceError, KdkitError, StageError
from kdkit.api.protocols import RunInfo
from kdkit.api.slots import Component, walk
from kdkit.engine.anchor import anchored
from kdkit.engine.boundary import ComponentBoundary
from kdkit.engine.context import Context
from kdkit.engine.events import Event, Sink
from kdkit.engine.files import json_line
from kdkit.engine.job import Outcome, StageJob
from kdkit.engine.manifest import describe_artifact
from kdkit.engine.metrics import Trackers
from kdkit.engine.redact import redact

if TYPE_CHECKING:
    from kdkit.recipe import Recipe, Stage

__all__ = ["execute", "execute_inline"]


def execute(job: StageJob, recipe: Recipe, emit: Sink, stopping: Callable[[], bool]) -> Outcome:
    """Run a stage to its end, good or bad. Errors come back as data; their tracebacks go to the stage's log."""
    stage = recipe.stages[job.stage]
    info = RunInfo(recipe=recipe.name, stage=job.stage, run_dir=Path(job.run_dir), config=recipe.data)
    trackers: Trackers | None = None
    try:
        trackers = Trackers(recipe.track, info, lambda text: emit(Event("log", job.stage, {"message": text})))
        context = Context(
            job, recipe=recipe.name, seed=recipe.seed, emit=emit, trackers=trackers, stopping=stopping
        )  # fmt: skip
        outcome = Outcome("ok", _outputs(stage, context, trackers))
    except KdkitError as error:
        _write_traceback(job.log_file, error)
        outcome = Outcome.of(error)
    if trackers is not None:
        trackers.finish(outcome.status)
    return outcome


def execute_inline(job: StageJob, recipe: Recipe, emit: Sink, stopping: Callable[[], bool]) -> Outcome:
    """As :func:`execute`, in the parent process, whose stdout belongs to the results of the command."""
    with redirect_stdout(sys.stderr):
        outcome = execute(job, recipe, emit, stopping)
    return Outcome.from_json(json.loads(json_line(outcome.to_json()))) if outcome.error is None else outcome


def _outputs(stage: Stage, context: Context, trackers: Trackers) -> dict[str, dict[str, Any]]:
    spec: Any = stage.found.spec
    params = anchored(stage.params, context.base_dir)
    nested = [slot.found for _, slot in walk(params) if isinstance(slot, Component)]
    with ComponentBoundary(stage.found, nested):
        try:
            artifacts = spec.run(params, context)
        except SystemExit as error:
            raise StageError(f"the stage called sys.exit({error.code!r})", where=stage.name) from error
    _check(stage, artifacts, context.out)
    for artifact in artifacts.values():
        if isinstance(artifact, ReportFiles):
            trackers.artifact(artifact.path)
    return {name: describe_artifact(artifact, context.out) for name, artifact in artifacts.items()}


def _check(stage: Stage, artifacts: Any, out: Path) -> None:
    """Hold a stage to what its spec declares.

    Raises:
        ConformanceError: Outputs are missing, of another type, or not below the stage's directory.
    """
    spec: Any = stage.found.spec
    where = f"stage {stage.name!r} ({stage.found.qualified_name})"
    if not isinstance(artifacts, Mapping) or set(artifacts) != set(spec.outputs):
        got = ", ".join(map(str, artifacts)) if isinstance(artifacts, Mapping) else type(artifacts).__name__
        raise ConformanceError(
            f"returned {got or 'nothing'}", where=where, allowed=", ".join(spec.outputs) or "an empty mapping"
        )
    for name, wanted in spec.outputs.items():
        artifact: Artifact = artifacts[name]
        if not isinstance(artifact, wanted):
            raise ConformanceError(
                f"output {name!r} is a {type(artifact).__name__}", where=where, allowed=wanted.__name__
            )
        if not artifact.path.is_relative_to(out) or not artifact.path.exists():
            raise ConformanceError(
                f"output {name!r} is {artifact.path}, which is not a file or directory below ctx.out", where=where
            )


def _write_traceback(log_file: Path, error: KdkitError) -> None:
    # A full disk may be the error itself; then the line that goes to the parent has to do.
    with contextlib.suppress(OSError), log_file.open("a", encoding="utf-8") as stream:
        stream.write(redact("".join(traceback.format_exception(error))))

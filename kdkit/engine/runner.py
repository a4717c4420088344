"""``kdkit run``: works through a plan until everything selected is done, or the first stage fails.

Running is idempotent. What is finished is reused after its files were verified, what was interrupted resumes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from kdkit.api.artifacts import Artifact, ReportFiles
from kdkit.api.errors import ExitCode, KdkitError, RecipeError, StageError, Stopped
from kdkit.engine.announce import Announcer, Status
from kdkit.engine.env import versions
from kdkit.engine.events import EventLog, Sink, utc_now
from kdkit.engine.execute import execute_inline
from kdkit.engine.files import environment_error, json_line
from kdkit.engine.job import Outcome, StageJob, code_identity
from kdkit.engine.launch import run_worker
from kdkit.engine.lock import Lock
from kdkit.engine.manifest import Manifest
from kdkit.engine.plan import Plan, PlannedStage, assess, make_plan, stage_inputs
from kdkit.engine.redact import redact
from kdkit.engine.rundir import RunDir, check_out
from kdkit.engine.selection import Selection
from kdkit.engine.stop import StopRequest, stop_on_signals
from kdkit.engine.store import STAGE_LOG, Store, store_root

if TYPE_CHECKING:
    from kdkit.recipe import Recipe

__all__ = ["Finished", "RunOptions", "run_recipe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How to run, none of which changes a result.

    Attributes:
        out: Parent of the run directories.
        selection: Which stages.
        inline: Run every stage in this process, for debugging.
        sinks: Receive every event.
    """

    out: Path = Path("runs")
    selection: Selection = field(default_factory=Selection)
    inline: bool = False
    sinks: Sequence[Sink] = ()


@dataclass(slots=True, kw_only=True)
class Finished:
    """What a run did.

    Attributes:
        run_dir: Its directory.
        artifacts: Outputs of every stage with a whole result, by stage and output name.
        entries: Store entries of those stages.
        error: Why the run ended early.
        exit_code: Of the command.
        pending: Forced stages that were not finished.
    """

    run_dir: Path
    artifacts: dict[str, dict[str, Artifact]] = field(default_factory=dict)
    entries: dict[str, Path] = field(default_factory=dict)
    error: KdkitError | None = None
    exit_code: ExitCode = ExitCode.OK
    pending: tuple[str, ...] = ()


def run_recipe(recipe: Recipe, options: RunOptions) -> Finished:
    """Run what is selected of ``recipe``.

    Returns:
        What happened, also when a stage failed or a signal stopped the run.

    Raises:
        KdkitError: Before any work: a path cannot be written, an input is missing, a name is no stage.
    """
    options.selection.check(recipe.stages)
    _refuse_secrets(recipe)
    store = Store(store_root())
    store.prepare()
    parent = check_out(options.out, recipe.name)
    plan = make_plan(recipe, store, options.selection)
    plan.check_environment()
    run_dir = RunDir.create(parent)
    try:
        run_dir.record(recipe, plan)
    except OSError as error:
        raise environment_error(error, where=run_dir.path) from error
    with stop_on_signals() as stop:
        return _Run(plan, options, run_dir, stop).run()


def _refuse_secrets(recipe: Recipe) -> None:
    """A secret in a recipe would be copied into the run, its log and the command that resumes.

    Raises:
        RecipeError: The value of an environment variable such as ``HF_TOKEN`` stands in the recipe.
    """
    text = json_line(recipe.data)
    if redact(text) != text:
        raise RecipeError(
            "the value of a secret environment variable stands in the recipe",
            where=str(recipe.path),
            hint="components read secrets from the environment; remove it",
        )


class _Run:
    """One run in progress."""

    def __init__(self, plan: Plan, options: RunOptions, run_dir: RunDir, stop: StopRequest) -> None:
        self.plan, self.recipe, self.store = plan, plan.recipe, plan.store
        self.options, self.run_dir, self.stop = options, run_dir, stop
        self.announce = Announcer(plan.recipe, run_dir.path, (EventLog(run_dir.events), *options.sinks))
        self.manifests: dict[str, Manifest | None] = {}
        self.planned = {planned.name: planned for planned in plan.stages}
        self.result = Finished(run_dir=run_dir.path, pending=options.selection.force)

    def run(self) -> Finished:
        started = monotonic()
        try:
            self.announce.run_started([planned.name for planned in self.plan.stages if planned.selected])
            for planned in self.plan.stages:
                self._stage(planned)
        except KdkitError as error:
            self._failed(error)
        except OSError as error:
            self._failed(environment_error(error))
        except KeyboardInterrupt:
            self._failed(Stopped("stopped at once"))
        self._finish(monotonic() - started)
        return self.result

    def _finish(self, seconds: float) -> None:
        error = self.result.error
        # A full disk may be why the run ended, so failing to log that is no second failure.
        with contextlib.suppress(OSError):
            self.announce.run_finished(_status(error), error, self.result.exit_code, seconds)

    def _stage(self, planned: PlannedStage) -> None:
        """Bring one stage to a whole result, if it is selected.

        Raises:
            KdkitError: It failed, or a signal asked to stop.
        """
        if not planned.selected:
            condition = self.store.condition(planned.entry_dir)
            if condition.state == "whole" and condition.manifest is not None:
                self._done(planned, condition.manifest)
            return
        if self.stop.requested():
            raise Stopped(f"stopped before stage {planned.name!r}")
        manifest, _ = self._reusable(planned)
        if manifest is None:
            with self.store.lock(planned.entry_dir) as lock:
                # Another run may have made it before we got the lock.
                manifest, why = self._reusable(planned, locked=True)
                if manifest is None:
                    manifest = self._execute(planned, lock, why or planned.why)
        else:
            self.announce.cached(planned)
        self._done(planned, manifest)

    def _done(self, planned: PlannedStage, manifest: Manifest) -> None:
        artifacts = manifest.artifacts(planned.entry_dir)
        self.manifests[planned.name] = manifest
        self.result.artifacts[planned.name] = artifacts
        self.result.entries[planned.name] = planned.entry_dir
        self.result.pending = tuple(name for name in self.result.pending if name != planned.name)
        self.run_dir.link_stage(planned.name, planned.entry_dir)
        for artifact in artifacts.values():
            if isinstance(artifact, ReportFiles):
                self.run_dir.copy_report(artifact.path)

    def _reusable(self, planned: PlannedStage, *, locked: bool = False) -> tuple[Manifest | None, str]:
        """The manifest of a result that is as good as new, or None and why the stage has to run."""
        condition = self.store.condition(planned.entry_dir)
        state, why = assess(planned.name, condition, self._inputs(planned), self.options.selection)
        if locked and state == "damaged":
            self.announce.log(f"{planned.entry_dir} is damaged ({why}) and is made again", planned.name)
        if locked and state == "resume" and condition.state == "finished":
            self.store.finish(planned.entry_dir)
            state = "cached"
        return (condition.manifest, "") if state == "cached" else (None, why)

    def _inputs(self, planned: PlannedStage) -> dict[str, str | None]:
        return stage_inputs(planned.stage, self.planned, self.manifests)

    def _execute(self, planned: PlannedStage, lock: Lock, why: str) -> Manifest:
        inputs = {key: digest or "" for key, digest in self._inputs(planned).items()}
        fresh = self.options.selection.fresh
        partial, resumed = self.store.open_partial(planned.entry_dir, inputs, fresh=fresh)
        self.run_dir.link_stage(planned.name, partial)
        self.announce.started(planned, why, resumed=resumed)
        begin = monotonic()
        try:
            outcome = self._launch(self._job(planned, partial, resumed=resumed), lock)
            if outcome.outputs is None:
                raise self._error(outcome, planned)
            manifest = self.store.publish(planned.entry_dir, self._draft(planned, outcome, inputs, monotonic() - begin))
        except KdkitError as error:
            self.announce.ended(planned, _status(error), monotonic() - begin, None)
            raise
        self.announce.ended(planned, "ok", monotonic() - begin, planned.entry_dir)
        return manifest

    def _launch(self, job: StageJob, lock: Lock) -> Outcome:
        stage = self.recipe.stages[job.stage]
        launch = getattr(stage.found.spec, "launch", "worker")
        if self.options.inline or launch == "inline":
            return execute_inline(job, self.recipe, self.announce.send, self.stop.requested)
        job_file = self.run_dir.job_file(job.stage)
        job.write(job_file)
        return run_worker(job, job_file, lock, self.announce.send, self.stop)

    def _job(self, planned: PlannedStage, partial: Path, *, resumed: bool) -> StageJob:
        return StageJob(
            recipe=str(self.run_dir.resolved.absolute()),
            base_dir=str(self.recipe.base_dir),
            stage=planned.name,
            key=planned.key,
            out=str(partial),
            run_dir=str(self.run_dir.path.absolute()),
            precision=self.plan.precision,
            pins=self.plan.pins,
            upstream={name: str(self.planned[name].entry_dir) for name in planned.stage.upstream},
            code=code_identity(planned.stage),
            resumed=resumed,
        )

    def _draft(self, planned: PlannedStage, outcome: Outcome, inputs: Mapping[str, str], seconds: float) -> Manifest:
        return Manifest(
            kind=planned.stage.found.spec.name,
            key=planned.key,
            recipe=self.recipe.name,
            stage=planned.name,
            seed=self.recipe.seed,
            created=utc_now(),
            seconds=round(seconds, 3),
            outputs=outcome.outputs or {},
            files={},
            inputs=inputs,
            explained=planned.explained,
            versions=versions(),
        )

    def _error(self, outcome: Outcome, planned: PlannedStage) -> KdkitError:
        """The error a stage ended with; its exit code is the command's, also for a plugin's own type of error."""
        if outcome.status == "failed":
            self.result.exit_code = outcome.exit_code
        error = outcome.error or StageError("ended without a result")
        error.where = f"stage {planned.name!r}" + (f": {error.where}" if error.where else "")
        if error.hint is None and not isinstance(error, Stopped):
            error.hint = f"see {self.run_dir.path / 'stages' / planned.name / STAGE_LOG}"
        return error

    def _failed(self, error: KdkitError) -> None:
        self.result.error = error
        if isinstance(error, Stopped):
            self.result.exit_code = self.stop.exit_code
        elif self.result.exit_code == ExitCode.OK:
            self.result.exit_code = ExitCode(error.exit_code)


def _status(error: KdkitError | None) -> Status:
    if error is None:
        return "ok"
    return "stopped" if isinstance(error, Stopped) else "failed"

"""The Python API: :func:`build`, :func:`run`, :func:`validate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdkit.api.artifacts import Artifact
from kdkit.api.errors import ExitCode, KdkitError, Problem, RecipeError, StageError
from kdkit.api.slots import LOOKUP, Component
from kdkit.engine.context import Builder
from kdkit.engine.files import read_json
from kdkit.engine.inputs import Inputs
from kdkit.engine.runner import Finished, RunOptions, run_recipe
from kdkit.engine.selection import Selection

__all__ = ["RunResult", "StageResult", "build", "run", "validate"]


@dataclass(frozen=True, slots=True)
class StageResult:
    """A finished stage.

    Attributes:
        name: As the recipe calls it.
        entry: Its directory in the store.
        outputs: Its artifacts by name, such as ``outputs["model"].path``.
    """

    name: str
    entry: Path
    outputs: Mapping[str, Artifact]

    def metrics(self) -> list[dict[str, Any]]:
        """What the stage logged, one mapping per line of its ``metrics.jsonl``; empty when it logged nothing."""
        file = self.entry / "metrics.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_bytes().split(b"\n") if line]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run did.

    Attributes:
        recipe: Name of the recipe.
        run_dir: Its directory, with the report and the event log.
        exit_code: What ``kdkit run`` would have exited with.
        error: Why the run ended early, or None.
        stages: Every stage with a whole result, in the order they ran.
    """

    recipe: str
    run_dir: Path
    exit_code: ExitCode
    error: KdkitError | None
    stages: Mapping[str, StageResult] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything selected is done."""
        return self.error is None

    def stage(self, name: str) -> StageResult:
        """A finished stage.

        Raises:
            StageError: It has no result; chained to the error that ended the run.
        """
        if name not in self.stages:
            raise StageError(
                f"stage {name!r} has no result", allowed=", ".join(self.stages) or "no stage has one"
            ) from self.error
        return self.stages[name]

    @property
    def report(self) -> dict[str, Any] | None:
        """The content of ``report.json``; None when no report stage has run."""
        file = self.run_dir / "report.json"
        return dict(read_json(file)) if file.is_file() else None


def run(
    path: str | Path,
    *,
    set: Mapping[str, Any] | None = None,  # noqa: A002 - the option's name on the command line
    var: Mapping[str, Any] | None = None,
    out: str | Path = "runs",
    start_at: str | None = None,
    until: str | None = None,
    only: Sequence[str] = (),
    force: Sequence[str] = (),
    fresh: bool = False,
    inline: bool = False,
) -> RunResult:
    """Run a recipe; what is finished already is reused.

    Args:
        path: The recipe file.
        set: Overrides by path, such as ``{"stages.kd.max_steps": 5}``.
        var: Values of variables that the recipe declares.
        out: Parent of the run directories.
        start_at: Only this stage and those that depend on it.
        until: Only this stage and those it depends on.
        only: Only these stages.
        force: Run these again although their results are there.
        fresh: Throw checkpoints away instead of resuming.
        inline: Run everything in this process, for debugging.

    Raises:
        KdkitError: Nothing could be started: the recipe is invalid, an input is missing, a path cannot be written.
            A stage that fails raises nothing; see ``ok`` and ``error`` of the result.
    """
    from kdkit.recipe import load_recipe

    recipe = load_recipe(Path(path), sets=_assignments(set), variables=_assignments(var))
    selection = Selection(first=start_at, until=until, only=tuple(only), force=tuple(force), fresh=fresh)
    return result_of(recipe.name, run_recipe(recipe, RunOptions(out=Path(out), selection=selection, inline=inline)))


def result_of(recipe: str, finished: Finished) -> RunResult:
    """The public form of what a run did."""
    stages = {
        name: StageResult(name, finished.entries[name], artifacts) for name, artifacts in finished.artifacts.items()
    }
    return RunResult(
        recipe=recipe,
        run_dir=finished.run_dir,
        exit_code=finished.exit_code,
        error=finished.error,
        stages=stages,
    )


def validate(
    path: str | Path,
    *,
    set: Mapping[str, Any] | None = None,  # noqa: A002 - the option's name on the command line
    var: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """Everything that is wrong with a recipe; empty when it is valid. Takes ``set`` and ``var`` as :func:`run`."""
    from kdkit.recipe import check_recipe

    return list(check_recipe(Path(path), sets=_assignments(set), variables=_assignments(var)).problems)


def build(kind: str, name: str, /, *args: Any, **params: Any) -> Any:
    """Build one component, such as ``build("loss", "forward-kl", temperature=2.0)``.

    Args:
        kind: Component kind, such as ``loss``; stages are run by recipes only.
        name: Short name or ``dist/name``.
        args: What the builder takes besides parameters: a ``RolloutModel`` for rollouts, a ``RunInfo`` for trackers.
        params: The component's parameters, nested components written as in a recipe. Paths start from the current
            directory.

    Raises:
        RecipeError: No such component, or wrong parameters.
        PluginError: The plugin is missing or broken.
    """
    from kdkit.host import Catalog

    catalog = Catalog.discover()
    found = catalog.find(kind, name)
    if kind == "stage":
        raise RecipeError("a stage cannot be built alone", where=name, hint="write a recipe and use kdkit.run")
    try:
        data = json.dumps(params, default=str)
        validated = found.spec.params.model_validate_json(data, context={LOOKUP: catalog})
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
        raise RecipeError(" | ".join(lines), where=f"{kind} {found.qualified_name}") from error
    builder = Builder(_SEED, Inputs(Path.cwd()), log=lambda line: print(line, file=sys.stderr))
    return builder.build(Component[Any](kind, found, validated), *args)


_SEED = 17
"""The seed of a recipe that gives none."""


def _assignments(values: Mapping[str, Any] | None) -> list[str]:
    """``NAME=VALUE`` options; JSON is YAML, so every value keeps its type."""
    return [f"{name}={json.dumps(value, default=str, ensure_ascii=False)}" for name, value in (values or {}).items()]

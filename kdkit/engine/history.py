"""Earlier runs, read from their directories."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from kdkit.api.errors import RecipeError, error_from_json
from kdkit.engine.files import read_json
from kdkit.engine.keys import differences
from kdkit.engine.rundir import EVENTS, PLAN

__all__ = ["RunDiff", "RunRecord", "StageRecord", "diff_records", "find_run", "iter_runs", "read_run"]

_LAST: Final = "LAST"
_HINT: Final = "see: kdkit runs list"


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What happened to a stage.

    ``state`` is ``cached``, ``ok``, ``failed`` or ``stopped``; ``started`` and ``waiting`` in an unfinished run.
    """

    name: str
    kind: str
    key: str
    state: str
    seconds: float | None
    explained: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run.

    Attributes:
        time: Name of its directory.
        status: ``ok``, ``failed``, ``stopped``, or ``unfinished`` when it is still running or was killed.
        seconds: Wall time, None while unfinished.
        error: Why it ended early, on one line.
    """

    path: Path
    recipe: str
    time: str
    status: Literal["ok", "failed", "stopped", "unfinished"]
    seconds: float | None
    error: str | None
    stages: tuple[StageRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """The run as plain data."""
        stages = [
            {"name": s.name, "kind": s.kind, "key": s.key, "state": s.state, "seconds": s.seconds} for s in self.stages
        ]
        return {
            "path": str(self.path),
            "recipe": self.recipe,
            "time": self.time,
            "status": self.status,
            "seconds": self.seconds,
            "error": self.error,
            "stages": stages,
        }


def iter_runs(out: Path) -> Iterator[RunRecord]:
    """All runs below ``out``, the oldest first."""
    for path in sorted(_plans(out), key=_age):
        yield read_run(path)


def _plans(out: Path) -> Iterator[Path]:
    """Directories of all runs below ``out``."""
    return (plan.parent for plan in out.glob(f"*/*/{PLAN}") if not plan.parent.is_symlink())


def _age(run: Path) -> tuple[str, str]:
    """Later for later runs."""
    return run.name, run.parent.name


def find_run(name: str, out: Path) -> Path:
    """The directory of a run.

    Args:
        name: A run's directory, ``RECIPE/TIME`` below ``out``, a recipe's name for its latest run, or ``LAST`` for the
            latest run of any recipe.
        out: Parent of the run directories.

    Raises:
        RecipeError: There is no such run.
    """
    for path in (Path(name), out / name):
        for candidate in (path, path / "latest"):
            if (candidate / PLAN).is_file():
                return candidate.resolve()
    if name == _LAST and (latest := max(_plans(out), key=_age, default=None)) is not None:
        return latest.resolve()
    raise RecipeError(f"there is no run {name!r}", where=str(out), hint=_HINT)


def read_run(path: Path) -> RunRecord:
    """The record of the run in ``path``.

    Raises:
        RecipeError: Its plan cannot be read.
    """
    try:
        plan = read_json(path / PLAN)
        planned = [stage for stage in plan["stages"] if stage["selected"]]
        events = list(_events(path / EVENTS))
        end: dict[str, Any] = next((event for event in reversed(events) if event["type"] == "run-finished"), {})
        error = next((event for event in reversed(events) if event["type"] == "error"), None)
        stages = tuple(_stage(stage, events) for stage in planned)
        return RunRecord(
            path=path,
            recipe=plan["recipe"],
            time=path.name,
            status=end.get("status", "unfinished"),
            seconds=end.get("seconds"),
            error=None if error is None else str(error_from_json(error["error"])),
            stages=stages,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"cannot be read as a run: {error}", where=str(path), hint=_HINT) from error


def _events(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            # The last line of a run that was killed may be cut short.
            continue


def _stage(planned: Mapping[str, Any], events: list[dict[str, Any]]) -> StageRecord:
    own = [event for event in events if event["stage"] == planned["stage"]]
    words = {"stage-cached": "cached", "stage-started": "started"}
    state, seconds = "waiting", None
    for event in own:
        state = words.get(event["type"], state)
        if event["type"] == "stage-finished":
            state, seconds = event["status"], event["seconds"]
    return StageRecord(planned["stage"], planned["kind"], planned["key"], state, seconds, planned["explained"])


@dataclass(frozen=True, slots=True)
class RunDiff:
    """In what two runs differ.

    Attributes:
        parameters: ``(stage, change)``; a stage that only one run has is one change.
        keys: ``(stage, key in a, key in b)``.
        metrics: ``(metric, value in a, value in b)``; None where a run lacks it.
    """

    parameters: tuple[tuple[str, str], ...]
    keys: tuple[tuple[str, str | None, str | None], ...]
    metrics: tuple[tuple[str, float | None, float | None], ...]

    def to_json(self) -> dict[str, Any]:
        """The differences as plain data."""
        return {
            "parameters": [{"stage": stage, "change": change} for stage, change in self.parameters],
            "keys": [{"stage": stage, "a": a, "b": b} for stage, a, b in self.keys],
            "metrics": [{"metric": name, "a": a, "b": b} for name, a, b in self.metrics],
        }


def diff_records(a: RunRecord, b: RunRecord) -> RunDiff:
    """Compare two runs: what went into their stages, and what came out."""
    before, after = {s.name: s for s in a.stages}, {s.name: s for s in b.stages}
    parameters: list[tuple[str, str]] = []
    keys: list[tuple[str, str | None, str | None]] = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            parameters.append((name, f"only in {'b' if old is None else 'a'}"))
        else:
            parameters += [(name, change) for change in differences(old.explained, new.explained)]
        key_a, key_b = old.key if old else None, new.key if new else None
        if key_a != key_b:
            keys.append((name, key_a, key_b))
    left, right = _metrics(a.path), _metrics(b.path)
    metrics = [(n, left.get(n), right.get(n)) for n in dict.fromkeys([*left, *right]) if left.get(n) != right.get(n)]
    return RunDiff(tuple(parameters), tuple(keys), tuple(metrics))


def _metrics(run: Path) -> dict[str, float]:
    """The report's values as ``MODEL/METRIC`` and every stage's last logged values as ``STAGE:METRIC``."""
    found: dict[str, float] = {}
    for link in sorted((run / "stages").iterdir() if (run / "stages").is_dir() else ()):
        for row in _events(link / "metrics.jsonl"):
            found.update({f"{link.name}:{name}": value for name, value in row.items() if name != "step"})
    try:
        models = read_json(run / "report.json")["models"]
        for model, facts in models.items():
            found.update({f"{model}/{name}": metric["value"] for name, metric in facts["metrics"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return found
    return found

"""Bodies of ``kdkit runs list``, ``show`` and ``diff``."""

from __future__ import annotations

from pathlib import Path

from kdkit.api.errors import ExitCode
from kdkit.cli.output import emit, emit_json, table
from kdkit.cli.progress import clock
from kdkit.engine.history import RunDiff, RunRecord, diff_records, find_run, iter_runs, read_run

__all__ = ["diff_runs", "list_runs", "show_run"]


def list_runs(out: Path, *, as_json: bool) -> int:
    """Print all runs below ``out``, the newest last; returns 0."""
    runs = list(iter_runs(out))
    if as_json:
        emit_json({"runs": [run.to_json() for run in runs]})
    elif runs:
        emit(table(("RECIPE", "TIME", "STATUS", "STAGES", "TOOK"), [_row(run) for run in runs]))
    else:
        emit(f"no runs in {out}")
    return int(ExitCode.OK)


def _row(run: RunRecord) -> tuple[str, str, str, str, str]:
    done = sum(stage.state in {"ok", "cached"} for stage in run.stages)
    return run.recipe, run.time, run.status, f"{done}/{len(run.stages)}", _took(run.seconds)


def _took(seconds: float | None) -> str:
    return "" if seconds is None else clock(seconds)


def show_run(name: str, out: Path, *, as_json: bool) -> int:
    """Print one run's stages; returns 0."""
    run = read_run(find_run(name, out))
    if as_json:
        emit_json(run.to_json())
        return int(ExitCode.OK)
    facts = [("run", str(run.path)), ("status", run.status), ("took", _took(run.seconds)), ("error", run.error or "")]
    reports = (run.path / name for name in ("report.html", "report.md"))
    facts += [("report", str(report)) for report in reports if report.is_file()]
    emit("\n".join(f"{name:<8}{value}" for name, value in facts if value))
    rows = [(s.name, s.kind, s.key, s.state, _took(s.seconds)) for s in run.stages]
    emit("\n" + table(("STAGE", "KIND", "KEY", "STATE", "TOOK"), rows))
    return int(ExitCode.OK)


def diff_runs(a: str, b: str, out: Path, *, as_json: bool) -> int:
    """Print in what two runs differ; returns 0 whether they do or not."""
    first, second = read_run(find_run(a, out)), read_run(find_run(b, out))
    diff = diff_records(first, second)
    if as_json:
        emit_json({"a": str(first.path), "b": str(second.path), **diff.to_json()})
    else:
        emit("\n".join(_lines(diff)) or "no differences")
    return int(ExitCode.OK)


def _lines(diff: RunDiff) -> list[str]:
    parts = []
    if diff.parameters:
        parts.append(table(("STAGE", "PARAMETER"), diff.parameters))
    if diff.keys:
        parts.append(table(("STAGE", "KEY A", "KEY B"), [(n, a or "-", b or "-") for n, a, b in diff.keys]))
    if diff.metrics:
        parts.append(table(("METRIC", "A", "B"), [(n, _number(a), _number(b)) for n, a, b in diff.metrics]))
    return ["\n\n".join(parts)] if parts else []


def _number(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.6g}"

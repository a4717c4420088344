"""Body of ``kdkit report``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from kdkit.api.errors import DataError, ExitCode, KdkitError, RecipeError

__all__ = ["report"]

_RUNS: Final = Path("runs")
_FILE: Final = "report.json"
_KEYS: Final = frozenset(
    {"recipe", "seed", "roles", "datasets", "models", "pairs", "retention", "gap_closed", "decoding", "notes"}
)


def report(run: str | None, as_json: bool, *, brief: bool = False) -> int:  # noqa: FBT001 - the command's option
    """Print the report of a run.

    Args:
        run: A run directory, a directory with ``report.json`` or that file, or a recipe name for the newest run of it;
            None for the newest run of all recipes under ``./runs``.
        as_json: Print ``report.json`` as it is instead of tables.
        brief: Print only the main tables.

    Returns:
        0.

    Raises:
        RecipeError: There is no such run, or the run has no report.
        DataError: The report is not one of kdkit's.
    """
    file = _find(run)
    text = file.read_text(encoding="utf-8")
    data = _parse(text, file)
    if as_json:
        sys.stdout.write(text.rstrip("\n") + "\n")
        return ExitCode.OK
    from kdkit.report.terminal import render_terminal

    Console(file=sys.stdout, highlight=False, markup=False, emoji=False).print(render_terminal(data, brief=brief))
    return ExitCode.OK


def _find(run: str | None) -> Path:
    if run is None:
        runs = _run_dirs(_RUNS.glob("*/*"))
        if not runs:
            raise RecipeError("there is no run yet", where=str(_RUNS), hint="start one with: kdkit run RECIPE")
        return _report_of(runs[-1], runs)
    path = Path(run).expanduser()
    if path.is_file():
        return path
    if path.is_dir() and (path / _FILE).is_file():
        return path / _FILE
    of_recipe = _run_dirs((path if path.is_dir() else _RUNS / run).glob("*"))
    if of_recipe:
        return _report_of(of_recipe[-1], of_recipe)
    if path.is_dir():
        raise _no_report(path, [])
    raise RecipeError(
        f"there is no run {run!r}", allowed="a run directory, a recipe's name", hint="see: kdkit runs list"
    )


def _run_dirs(paths: Iterable[Path]) -> list[Path]:
    """Run directories, the newest last."""
    return sorted((path for path in paths if _is_run(path)), key=_when)


def _when(run: Path) -> tuple[str, int, str]:
    """Runs are called by their UTC time, with ``-2``, ``-3``, ... for further ones in the same second."""
    time, _, again = run.name.partition("Z")
    return time, int(again[1:]) if again[1:].isdecimal() else 1, str(run)


def _is_run(path: Path) -> bool:
    """A run's directory, and not ``latest``, which is a link to one."""
    return path.is_dir() and not path.is_symlink() and (path / "recipe.yaml").is_file()


def _report_of(run: Path, runs: list[Path]) -> Path:
    if (run / _FILE).is_file():
        return run / _FILE
    raise _no_report(run, runs)


def _no_report(run: Path, runs: list[Path]) -> KdkitError:
    """A newer run without a report is named, never passed over for an older one."""
    older = [path for path in runs if (path / _FILE).is_file()]
    return RecipeError(
        "this run has no report: it has no report stage, or did not get to it",
        where=str(run),
        hint=f"the newest report is: kdkit report {older[-1]}" if older else None,
    )


def _parse(text: str, file: Path) -> Mapping[str, Any]:
    try:
        data: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not a report: {error.msg}", where=f"{file}:{error.lineno}:{error.colno}") from error
    found: Mapping[str, Any] = data if isinstance(data, dict) else {}
    missing = sorted(_KEYS.difference(found))
    if missing:
        raise DataError(f"not a report of this version of kdkit: no {', '.join(missing)}", where=str(file))
    return found

"""Body of ``kdkit run``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kdkit.api.errors import DataError, RecipeError
from kdkit.cli.output import emit, log, print_error, shown
from kdkit.engine.runner import Finished, RunOptions, run_recipe
from kdkit.recipe import load_recipe

if TYPE_CHECKING:
    from kdkit.engine.selection import Selection

__all__ = ["resume_command", "run"]

_DEFAULT_OUT: Final = Path("runs")


def run(
    recipe: Path, sets: Sequence[str], variables: Sequence[str], out: Path, selection: Selection, *, inline: bool
) -> int:
    """Run a recipe, show its progress, and print where everything is.

    Returns:
        The exit code.

    Raises:
        KdkitError: Before any work.
    """
    from kdkit.cli.progress import make_view

    loaded = load_recipe(recipe, sets=sets, variables=variables)
    with make_view(list(loaded.stages), sys.stderr) as view:
        finished = run_recipe(loaded, RunOptions(out=out, selection=selection, inline=inline, sinks=(view.show,)))
    _print_results(finished)
    if finished.error is not None:
        print_error(finished.error)
        log("resume with:")
        log(resume_command(recipe, sets, variables, out, selection, pending=finished.pending, inline=inline))
    return int(finished.exit_code)


def _print_results(finished: Finished) -> None:
    has_report = (finished.run_dir / "report.json").is_file()
    if has_report:
        _print_report(finished.run_dir)
    emit(f"run     {shown(finished.run_dir)}")
    for name, artifacts in finished.artifacts.items():
        for output, artifact in artifacts.items():
            emit(f"result  {name}.{output}  {shown(artifact.path)}")
    for name in ("report.html", "report.md"):
        if (finished.run_dir / name).is_file():
            emit(f"report  {shown(finished.run_dir / name)}")
    if has_report:
        emit(f"next    kdkit report {shown(finished.run_dir)}")
        emit("        (pairs, speed, decoding, limits of the numbers)")


def _print_report(run_dir: Path) -> None:
    from kdkit.cli.report import report

    try:
        report(str(run_dir), False, brief=True)  # noqa: FBT003 - the command's own signature
    except (DataError, RecipeError) as error:
        # A report stage of a plugin may write another format; its files are there all the same.
        log(f"the report has no table: {error}")


def resume_command(
    recipe: Path,
    sets: Sequence[str],
    variables: Sequence[str],
    out: Path,
    selection: Selection,
    *,
    pending: Sequence[str],
    inline: bool,
) -> str:
    """The command that goes on where this run ended, quoted for a shell.

    ``--fresh`` is left out, because it would throw away what this run saved, and so are forced stages that are done.
    """
    words = ["kdkit", "run", str(recipe)]
    words += [word for text in sets for word in ("--set", text)]
    words += [word for text in variables for word in ("--var", text)]
    words += ["--out", str(out)] if out != _DEFAULT_OUT else []
    words += ["--from", selection.first] if selection.first else []
    words += ["--until", selection.until] if selection.until else []
    words += [word for name in selection.only for word in ("--only", name)]
    words += [word for name in pending for word in ("--force", name)]
    words += ["--inline"] if inline else []
    return shlex.join(words)

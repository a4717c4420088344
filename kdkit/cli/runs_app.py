"""Signatures of ``kdkit runs``; the bodies are imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from kdkit.cli import complete
from kdkit.cli.options import Json, group

__all__ = ["RUNS", "Out", "runs_app"]

runs_app = group("Look at earlier runs.")

RUNS: Final = Path("runs")
Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", autocompletion=complete.files, help="Parent of the run directories.")
]
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        autocompletion=complete.runs,
        help="Run directory, RECIPE/TIME, a recipe's name for its latest, or LAST.",
    ),
]


@runs_app.command("list")
def runs_list(*, out: Out = RUNS, as_json: Json = False) -> None:
    """List all runs, the newest last."""
    from kdkit.cli.runs import list_runs

    raise typer.Exit(list_runs(out, as_json=as_json))


@runs_app.command("show")
def runs_show(run: Run, *, out: Out = RUNS, as_json: Json = False) -> None:
    """Show the stages of a run."""
    from kdkit.cli.runs import show_run

    raise typer.Exit(show_run(run, out, as_json=as_json))


@runs_app.command("diff")
def runs_diff(a: Run, b: Run, *, out: Out = RUNS, as_json: Json = False) -> None:
    """Show the parameters, keys and metrics in which two runs differ."""
    from kdkit.cli.runs import diff_runs

    raise typer.Exit(diff_runs(a, b, out, as_json=as_json))


@runs_app.command("rollouts")
def runs_rollouts(
    run: Run,
    *,
    stage: Annotated[str | None, typer.Option("--stage", help="Which stage, if several have rollouts.")] = None,
    iteration: Annotated[int | None, typer.Option("--iteration", min=1, help="Only those of one iteration.")] = None,
    worst: Annotated[int, typer.Option("--worst", min=0, metavar="N", help="Print the N with the lowest reward.")] = 0,
    best: Annotated[int, typer.Option("--best", min=0, metavar="N", help="Print the N with the highest reward.")] = 0,
    out: Out = RUNS,
    as_json: Json = False,
) -> None:
    """Read what a student wrote in a grpo stage, and what it was rewarded for."""
    from kdkit.cli.rollouts import Choice, show_rollouts

    choice = Choice(stage=stage, iteration=iteration, worst=worst, best=best)
    raise typer.Exit(show_rollouts(run, out, choice, as_json=as_json))

"""Signatures of ``kdkit rewards``; the bodies are imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdkit.cli import complete
from kdkit.cli.options import Json, Recipe, Sets, Variables, group

__all__ = ["rewards_app"]

rewards_app = group("Try rewards before a run learns from them.")

Stage = Annotated[
    str | None,
    typer.Option(
        "--stage",
        metavar="NAME",
        autocompletion=complete.stages,
        help="The stage whose rewards are meant, if there are several.",
    ),
]
Index = Annotated[int, typer.Option("--example", metavar="N", min=0, help="Which row of the stage's data, from 0.")]
Sample = Annotated[
    bool,
    typer.Option("--sample", help="Take the rows that come with the plugin of the dataset; reads no file."),
]


@rewards_app.command("try")
def rewards_try(
    recipe: Recipe,
    *,
    completion: Annotated[
        str,
        typer.Option(
            "--completion",
            metavar="FILE",
            autocompletion=complete.files,
            help="The completion as text; - is standard input.",
        ),
    ],
    example: Index = 0,
    stage: Stage = None,
    sample: Sample = False,
    sets: Sets = None,
    variables: Variables = None,
    as_json: Json = False,
) -> None:
    """Score one completion with a recipe's rewards and show every component.

    Programs in it are run in the sandbox that the recipe names.
    """
    from kdkit.cli.rewards import Choice
    from kdkit.cli.rewards import try_completion as body

    choice = Choice(recipe, tuple(sets or ()), tuple(variables or ()), stage=stage, example=example, sample=sample)
    raise typer.Exit(body(choice, Path(completion), as_json=as_json))


@rewards_app.command("doctor")
def rewards_doctor(
    recipe: Recipe,
    *,
    example: Index = 0,
    stage: Stage = None,
    sample: Sample = False,
    sets: Sets = None,
    variables: Variables = None,
    as_json: Json = False,
) -> None:
    """Score a bank of hostile completions with a recipe's rewards; exit code 5 when one beats an honest wrong answer.

    What a model earns without trying is what it learns. Hostile programs are run in the sandbox that the recipe names.
    """
    from kdkit.cli.rewards import Choice
    from kdkit.cli.rewards import doctor as body

    choice = Choice(recipe, tuple(sets or ()), tuple(variables or ()), stage=stage, example=example, sample=sample)
    raise typer.Exit(body(choice, as_json=as_json))

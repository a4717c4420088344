"""Options that several commands share, and how groups of commands look. Light: nothing heavier than typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import typer

from kdkit.cli import complete

__all__ = ["First", "Force", "Fresh", "Json", "Kind", "Only", "Recipe", "Sets", "Until", "Variables", "group"]

_SETTINGS: Final = {"help_option_names": ["-h", "--help"]}


def group(summary: str) -> typer.Typer:
    """A group of commands; ``summary`` is its line in the help."""
    return typer.Typer(
        help=summary,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=_SETTINGS,
    )


Kind: TypeAlias = Literal[
    "loss", "reward", "dataset", "teacher", "quantizer", "metric", "stage", "rollout", "tracker", "sandbox"
]
"""Kinds of components, as the help of commands names them; light, unlike :data:`kdkit.api.specs.KINDS`."""

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", autocompletion=complete.recipes, help="Recipe file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", autocompletion=complete.settings, help="Override, as in stages.kd.max_steps=50."
    ),
]
Variables = Annotated[
    list[str] | None,
    typer.Option(
        "--var", metavar="NAME=VALUE", autocompletion=complete.variables, help="Value of a variable of the recipe."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
First = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="STAGE", autocompletion=complete.stages, help="Only this stage and those that depend on it."
    ),
]
Until = Annotated[
    str | None,
    typer.Option(
        "--until", metavar="STAGE", autocompletion=complete.stages, help="Only this stage and those it depends on."
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="STAGE", autocompletion=complete.stages, help="Only this stage; repeatable."),
]
Force = Annotated[
    list[str] | None,
    typer.Option(
        "--force", metavar="STAGE", autocompletion=complete.stages, help="Run again although it is done; repeatable."
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Throw checkpoints away instead of resuming.")]

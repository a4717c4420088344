"""Options that several commands share, and how groups of commands look. Light: nothing but typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import typer

__all__ = ["Json", "Kind", "Recipe", "Sets", "Variables", "group"]

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
"""Kinds of components."""

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override, as in stages.kd.max_steps=50.")
]
Variables = Annotated[
    list[str] | None, typer.Option("--var", metavar="NAME=VALUE", help="Value of a variable of the recipe.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

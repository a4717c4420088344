"""Signatures of ``kdkit models``; the bodies are imported when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdkit.cli import complete
from kdkit.cli.options import group

__all__ = ["models_app"]

models_app = group("Fetch and shrink models.")


@models_app.command("pull")
def models_pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", autocompletion=complete.known_models, help="A name that kdkit knows; see kdkit doctor."
        ),
    ],
    *,
    dest: Annotated[
        Path | None, typer.Option("--dest", metavar="DIR", autocompletion=complete.files, help="The directory to make.")
    ] = None,
) -> None:
    """Fetch a small open model and print its directory."""
    from kdkit.cli.models import pull_model

    raise typer.Exit(pull_model(name, dest))


@models_app.command("prune")
def models_prune(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", autocompletion=complete.models, help="Directory, Hub id or known name.")
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", autocompletion=complete.files, help="The directory to make.")],
    *,
    keep_layers: Annotated[
        str, typer.Option("--keep-layers", metavar="LAYERS", help="A count, every-2nd, or indices such as 0,1,5.")
    ],
) -> None:
    """Write a copy of a model that keeps only some of its layers."""
    from kdkit.cli.models import prune_model

    raise typer.Exit(prune_model(source, dest, keep_layers))

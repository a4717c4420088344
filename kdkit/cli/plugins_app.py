"""Signatures of ``kdkit plugins``; bodies are imported when a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from kdkit.cli import complete
from kdkit.cli.options import Json, group

__all__ = ["plugins_app"]

plugins_app = group("See what is installed.")


@plugins_app.command("list")
def plugins_list(
    *,
    kind: Annotated[
        str | None,
        typer.Option("--kind", metavar="KIND", autocompletion=complete.kinds, help="Only this kind, such as loss."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List all components and the plugins that are broken."""
    from kdkit.cli.plugins import list_plugins

    raise typer.Exit(list_plugins(as_json, kind))


@plugins_app.command("show")
def plugins_show(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="[KIND]", autocompletion=complete.kinds_and_names, help="Such as loss; may be left out."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", autocompletion=complete.names, help="A component, or a distribution."),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Show a component's parameters with a snippet for a recipe, or what a distribution provides."""
    from kdkit.cli.plugins import show_plugin

    raise typer.Exit(show_plugin(kind, name, as_json))


@plugins_app.command("check")
def plugins_check(
    dist: Annotated[
        str,
        typer.Argument(
            metavar="DIST", autocompletion=complete.dists, help="An installed distribution, such as kdkit-acme."
        ),
    ],
    *,
    as_json: Json = False,
) -> None:
    """Check an installed plugin: imports, declarations, builders, samples. Exit code 3 when a check fails."""
    from kdkit.cli.plugins_check import check_plugin

    raise typer.Exit(check_plugin(dist, as_json=as_json))

"""Signature of ``kdkit sandbox``; its body is imported when the command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from kdkit.cli import complete
from kdkit.cli.options import Json, group

__all__ = ["sandbox_app"]

sandbox_app = group("Try what keeps generated programs from doing harm.")


@sandbox_app.command("check")
def sandbox_check(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[SANDBOX]", autocompletion=complete.sandboxes, help="Only this one, such as auto."),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Run programs that try to break out of each sandbox. Exit code 4 when none holds."""
    from kdkit.cli.sandbox import check_sandboxes

    raise typer.Exit(check_sandboxes(name, as_json=as_json))

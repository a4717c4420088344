"""How every group of commands looks."""

from __future__ import annotations

import typer

__all__ = ["group"]


def group(summary: str) -> typer.Typer:
    """A group of commands that prints its help when it is called without one."""
    return typer.Typer(
        help=summary,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

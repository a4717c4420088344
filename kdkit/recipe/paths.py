"""Paths as recipes write them. Nothing here raises: a path that cannot even be looked at does not exist."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

__all__ = ["exists", "is_local", "is_relative", "placed"]

_HOME: Final = re.compile(r"~[A-Za-z0-9._-]*(/|$)")


def is_local(text: str) -> bool:
    """Whether ``text`` is a path and not a name: it starts with ``./``, ``../``, ``/`` or ``~``."""
    return text in {".", ".."} or text.startswith(("./", "../", "/", "~"))


def is_relative(text: str) -> bool:
    """Whether ``text`` is a path whose meaning depends on a directory or a person."""
    return text in {".", ".."} or text.startswith(("./", "../")) or _HOME.match(text) is not None


def placed(text: str, directory: Path) -> Path:
    """The path ``text`` as seen from ``directory``, without ``.`` and ``..``; an unknown user's ``~`` stays."""
    # Path.expanduser raises for an unknown user, and Path.resolve for a loop of links.
    return Path(os.path.normpath(directory / os.path.expanduser(text)))  # noqa: PTH111


def exists(path: Path, *, directory: bool = False, file: bool = False) -> bool:
    """Whether there is something at ``path``, of the kind asked for."""
    try:
        return path.is_dir() if directory else path.is_file() if file else path.exists()
    except (OSError, ValueError):  # too long, not permitted
        return False

"""Fault: no hook is called this."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdkit.api import LossSpec, hookimpl
from kdkit_broken.working import spec_of


@hookimpl
def kdkit_loses() -> Iterator[LossSpec[Any]]:
    """Meant to be ``kdkit_losses``."""
    yield spec_of("broken-misspelt-hook")

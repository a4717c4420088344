"""Fault: it stops in the middle of its components."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdkit.api import LossSpec, hookimpl
from kdkit_broken.working import spec_of


@hookimpl
def kdkit_losses() -> Iterator[LossSpec[Any]]:
    """One loss, and an error in place of the next."""
    yield spec_of("broken-generator")
    raise OSError("no second loss")

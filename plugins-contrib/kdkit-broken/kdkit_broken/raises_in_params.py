"""Fault: the class of its parameters cannot be made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdkit.api import LossSpec, Params, hookimpl
from kdkit_broken.working import spec_of

_DEFAULTS = {"alpha": 1.0}


class BrokenParams(Params):
    """Its default is looked up under another name."""

    beta: float = _DEFAULTS["beta"]
    """A share."""


@hookimpl
def kdkit_losses() -> Iterator[LossSpec[Any]]:
    """Never reached."""
    yield spec_of("broken-params", BrokenParams)

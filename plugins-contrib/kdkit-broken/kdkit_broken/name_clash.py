"""No fault by itself: the name of a built-in loss, which alone says no longer which one is meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdkit.api import LossSpec, hookimpl
from kdkit_broken.working import spec_of


@hookimpl
def kdkit_losses() -> Iterator[LossSpec[Any]]:
    """``kdkit-broken/forward-kl``."""
    yield spec_of("forward-kl")

"""Fault: a hook that wants an argument which kdkit does not have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdkit.api import LossSpec, hookimpl
from kdkit_broken.working import spec_of


@hookimpl
def kdkit_losses(config: Any) -> Iterator[LossSpec[Any]]:
    """The argument is not in the specification of the hook."""
    del config
    yield spec_of("broken-wrong-signature")

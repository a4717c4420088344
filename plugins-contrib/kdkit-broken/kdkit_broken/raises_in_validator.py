"""Fault, found when a recipe uses it: a validator raises something that is no complaint about the value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import field_validator

from kdkit.api import LossSpec, Params, hookimpl
from kdkit_broken.working import spec_of


class BrokenParams(Params):
    """A share of nothing."""

    beta: float = 0.5
    """A share."""

    @field_validator("beta")
    @classmethod
    def _in_parts(cls, value: float) -> float:
        return value / (value - value)


@hookimpl
def kdkit_losses() -> Iterator[LossSpec[Any]]:
    """``broken-validator``, which can be listed."""
    yield spec_of("broken-validator", BrokenParams)

"""What would be in order: a loss without parameters."""

from __future__ import annotations

from typing import Any

from kdkit.api import LossSpec, Params

__all__ = ["spec_of"]


class NoParams(Params):
    """No parameters."""


def _zero(x: Any, /) -> Any:
    return 0 * x.student_logits.sum(-1)


def spec_of(name: str, params: type[Params] = NoParams) -> LossSpec[Any]:
    """A loss called ``name`` that is always 0."""
    return LossSpec(name=name, summary="Always 0, from a package for tests", params=params, build=lambda _: _zero)

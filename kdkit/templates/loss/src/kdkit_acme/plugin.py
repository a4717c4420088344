"""What kdkit reads of this package. Keep it light: what lists or checks components imports it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdkit.api import LossSpec, Params, hookimpl
from pydantic import Field

if TYPE_CHECKING:
    from kdkit.api import TokenLoss


class AcmeParams(Params):
    """The squared Hellinger distance between teacher and student: 1 - sum of sqrt(p q)."""

    temperature: float = Field(1.0, gt=0)
    """Softmax temperature of both models; a bounded distance has no factor T^2."""


def _build(params: AcmeParams) -> TokenLoss:
    from kdkit_acme import loss

    return loss.AcmeLoss(temperature=params.temperature)


@hookimpl
def kdkit_losses() -> Iterator[LossSpec[Any]]:
    """The losses of this package."""
    yield LossSpec(
        name="acme",
        summary="Squared Hellinger distance between teacher and student",
        params=AcmeParams,
        build=_build,
        needs=frozenset({"logits", "topk"}),
    )

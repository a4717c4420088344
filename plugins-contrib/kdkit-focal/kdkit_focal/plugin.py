"""What kdkit sees of this package. It imports no torch, so that `kdkit plugins list` stays instant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from kdkit.api import LossSpec, Params, hookimpl

if TYPE_CHECKING:
    from kdkit.api import TokenLoss


class FocalKLParams(Params):
    """Forward KL, times how far the student still is from the teacher at this token."""

    gamma: float = Field(2.0, ge=1)
    """Exponent of the weight: the larger, the less a token counts where both models agree already."""
    temperature: float = Field(1.0, gt=0)
    """Softmax temperature T of both models; the value is T^2 times the loss at T."""


def _build(params: FocalKLParams) -> TokenLoss:
    from kdkit_focal.loss import FocalKL

    return FocalKL(gamma=params.gamma, temperature=params.temperature)


@hookimpl
def kdkit_losses() -> Iterator[LossSpec[FocalKLParams]]:
    """The loss of this package."""
    yield LossSpec(
        name="focal-kl",
        summary="Forward KL with a weight on tokens that the student has not learned",
        params=FocalKLParams,
        build=_build,
        needs=frozenset({"logits", "topk"}),
    )

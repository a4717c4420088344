"""Built-in losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kdkit.api import LossSpec, Params, hookimpl

if TYPE_CHECKING:
    from kdkit.api import TokenLoss


class CrossEntropyParams(Params):
    """Negative log-likelihood of the target token; it has no temperature."""


class ForwardKLParams(Params):
    """Forward KL from the teacher to the student."""

    temperature: float = Field(1.0, gt=0)
    """Softmax temperature T of both models; the value is T^2 KL(p_T || q_T), so that gradients keep their scale."""


def _cross_entropy(params: CrossEntropyParams) -> TokenLoss:
    del params
    from kdkit.plugins.losses.token import cross_entropy

    return cross_entropy


def _forward_kl(params: ForwardKLParams) -> TokenLoss:
    from kdkit.plugins.losses.token import ForwardKL

    return ForwardKL(temperature=params.temperature)


@hookimpl
def kdkit_losses() -> Iterator[LossSpec[Any]]:
    """The token losses."""
    yield LossSpec(
        name="cross-entropy",
        summary="Negative log-likelihood of the target tokens",
        params=CrossEntropyParams,
        build=_cross_entropy,
    )
    yield LossSpec(
        name="forward-kl",
        summary="KL(teacher || student) per token, dense or top-k with a tail bucket",
        params=ForwardKLParams,
        build=_forward_kl,
        needs=frozenset({"logits", "topk"}),
    )

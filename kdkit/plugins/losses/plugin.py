"""Built-in losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from kdkit.api import LossSpec, Params, hookimpl

if TYPE_CHECKING:
    from kdkit.api import AlignedLoss, TokenLoss


_NEAREST: Final = 1e-3


class CrossEntropyParams(Params):
    """Negative log-likelihood of the target token; it has no temperature."""


class DivergenceParams(Params):
    """What every divergence between teacher and student takes."""

    temperature: float = Field(1.0, gt=0)
    """Softmax temperature T of both models; the value is T^2 times the divergence at T, so that gradients keep their
    scale."""


class ForwardKLParams(DivergenceParams):
    """Forward KL from the teacher to the student: covers all that the teacher does."""


class ReverseKLParams(DivergenceParams):
    """Reverse KL from the student to the teacher: keeps to what the teacher does most. It is infinite where the teacher
    alone rules a token out (a logit of -inf); ``jsd`` and ``skew-reverse-kl`` are finite there.
    """


class JSDParams(DivergenceParams):
    """Generalised Jensen-Shannon divergence."""

    beta: float = Field(0.5, ge=0, le=1)
    """The teacher's share of the mixture; 0 is the forward KL, 1 the reverse KL."""
    normalized: bool = False
    """Divide by beta (1 - beta), so that the scale does not change with beta and the ends are limits. Then beta is 0 or
    1, or at least 0.001 away from both: nearer, float32 cannot compute it."""

    @model_validator(mode="after")
    def _computable(self) -> Self:
        if self.normalized and 0 < min(self.beta, 1 - self.beta) < _NEAREST:
            raise PydanticCustomError("beta", "normalized: true wants a beta of 0, 1, or from 0.001 to 0.999")
        return self


class SkewParams(DivergenceParams):
    """KL to a mixture of both models, which is finite where one of them has no mass."""

    alpha: float = Field(0.1, ge=0, lt=1)
    """Share of the first model in the mixture; 0 is the plain KL."""


class AdaptiveKLParams(DivergenceParams):
    """Forward and reverse KL, weighted by where teacher and student differ."""

    head_mass: float = Field(0.5, gt=0, lt=1)
    """The teacher's most probable tokens up to this probability are the head, whose gap weights the forward KL; the gap
    of the rest weights the reverse KL."""


class TotalVariationParams(Params):
    """Half the sum of absolute differences of probabilities."""

    temperature: float = Field(1.0, gt=0)
    """Softmax temperature of both models; a bounded distance has no factor T^2."""


class ULDParams(Params):
    """Distance between the sorted probabilities of student and teacher: for a teacher with another tokenizer.

    Tokens are put into the smallest groups that cover the same text on both sides, the end of an answer being one of
    them; each group has one value, and the loss is their mean over the optimiser step. The distance sees how
    probability is spread, not over which tokens: mix it with cross-entropy, which says which token is right.
    """

    merge: Literal["joint", "first"] = "joint"
    """Distribution of a group of several tokens. ``first``: that of its first token, where both models have read the
    same text. ``joint``: the same times the probabilities of the group's further tokens, so that the entry of the first
    token is the probability of the whole group; it sums to less than one, and only this form trains the further
    tokens. Their gradient vanishes where they are improbable, which cross-entropy in the mixture makes up for."""
    temperature: float = Field(1.0, gt=0)
    """Softmax temperature of both models; a bounded distance has no factor T^2."""


def _cross_entropy(params: CrossEntropyParams) -> TokenLoss:
    del params
    from kdkit.plugins.losses.token import cross_entropy

    return cross_entropy


def _uld(params: ULDParams) -> AlignedLoss:
    from kdkit.plugins.losses.aligned import ULD

    return ULD(**params.model_dump())


def _token(name: str) -> Callable[[Params], TokenLoss]:
    """Builds the class ``name`` of the implementation module, whose fields are the parameters."""

    def build(params: Params) -> TokenLoss:
        from kdkit.plugins.losses import token

        loss: TokenLoss = getattr(token, name)(**params.model_dump())
        return loss

    return build


_DIVERGENCES: tuple[tuple[str, str, str, type[Params]], ...] = (
    ("forward-kl", "ForwardKL", "KL(teacher || student) per token", ForwardKLParams),
    ("reverse-kl", "ReverseKL", "KL(student || teacher) per token", ReverseKLParams),
    ("jsd", "JSD", "Generalised Jensen-Shannon divergence (GKD)", JSDParams),
    ("skew-kl", "SkewKL", "KL(teacher || mixture) with a little teacher in the mixture (DistiLLM)", SkewParams),
    ("skew-reverse-kl", "SkewReverseKL", "KL(student || mixture) with a little student in it (DistiLLM)", SkewParams),
    ("adaptive-kl", "AdaptiveKL", "Forward and reverse KL weighted by head and tail gaps (AKL)", AdaptiveKLParams),
    ("tvd", "TotalVariation", "Total variation distance", TotalVariationParams),
)
"""Name, class, summary and parameters of the losses that compare with a teacher, dense or top-k with a tail."""


@hookimpl
def kdkit_losses() -> Iterator[LossSpec[Any]]:
    """The built-in losses."""
    yield LossSpec(
        name="cross-entropy",
        summary="Negative log-likelihood of the target tokens",
        params=CrossEntropyParams,
        build=_cross_entropy,
    )
    for name, class_name, summary, params in _DIVERGENCES:
        yield LossSpec(
            name=name, summary=summary, params=params, build=_token(class_name), needs=frozenset({"logits", "topk"})
        )
    yield LossSpec(
        name="uld",
        summary="Distance of sorted probabilities, for another tokenizer (ULD)",
        params=ULDParams,
        build=_uld,
        loss_kind="aligned",
        needs=frozenset({"logits"}),
    )

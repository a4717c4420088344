"""Built-in losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from kdkit.api import LossSpec, Params, hookimpl

if TYPE_CHECKING:
    from kdkit.api import AlignedLoss, PolicyLoss, RepresentationLoss, TokenLoss
    from kdkit.api.specs import PolicyNeed


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


class HiddenParams(Params):
    """What losses of hidden states take. Layers are counted as ``output_hidden_states`` of transformers does: 0 is the
    embedding, i what layer i puts out, and the last one comes after the final norm. Negative numbers count from the
    end. Compared are the positions that predict the learned tokens; teacher and student need the same tokenizer.
    """

    layers: Literal["even", "last"] | list[Annotated[list[int], Field(min_length=2, max_length=2)]] = "even"
    """Pairs [student, teacher], such as [[5, 10], [-1, -1]]. ``even``: every layer of the student with the teacher's at
    the same relative depth (TinyBERT's uniform strategy; the embedding is not among them). ``last``: the last ones."""
    projector: Literal["linear", "none"] = "linear"
    """What maps the student's states to the teacher's width. ``linear``: a matrix for each pair, trained with the
    student by the same optimiser, kept in checkpoints, and not part of the saved model. ``none``: nothing; both widths
    have to be equal."""

    @field_validator("layers")
    @classmethod
    def _some_pair(cls, value: str | list[list[int]]) -> str | list[list[int]]:
        if not value:
            raise PydanticCustomError("layers", "at least one pair [student, teacher], or even, or last")
        return value


class HiddenMSEParams(HiddenParams):
    """Mean square of the difference of hidden states, a sum over pairs of layers (TinyBERT, without attention maps).
    Layers with large states weigh more. With token losses beside it, set a weight: its scale is that of the states.
    """


class HiddenCosineParams(HiddenParams):
    """One minus the cosine of hidden states, a sum over pairs of layers: compares directions, whatever the lengths
    (DistilBERT, whose setting is the default).
    """

    layers: Literal["even", "last"] | list[Annotated[list[int], Field(min_length=2, max_length=2)]] = "last"
    """Pairs [student, teacher], such as [[5, 10], [-1, -1]]. ``even``: every layer of the student with the teacher's at
    the same relative depth (the embedding is not among them). ``last``: the last ones."""
    projector: Literal["linear", "none"] = "none"
    """What maps the student's states to the teacher's width. ``linear``: a matrix for each pair, trained with the
    student by the same optimiser, kept in checkpoints, and not part of the saved model. ``none``: nothing; both widths
    have to be equal."""


class MiniLLMParams(Params):
    """MiniLLM's policy gradient: sampled tokens become more or less probable by their advantage.

    The stage computes the advantages: what the teacher thinks of a token and all after it, next to what the student
    thought when it sampled. The value per token is max(-A r, -A clip(r)), where r is the token's probability now over
    that when it was sampled, times its importance weight.
    """

    cliprange: float | None = Field(0.2, gt=0)
    """A ratio r outside 1 - cliprange to 1 + cliprange has no gradient when its advantage would move it further out.
    null never clips."""
    is_in_clip: bool = True
    """Where the importance weight w of sampling from a mixture stands: within the clipped ratio, as in the authors'
    code (with w above 1 + cliprange or below 1 - cliprange a token may have no gradient from the start), or outside, as
    a factor of the clipped value."""


class OnPolicyReverseKLParams(Params):
    """Reverse KL on the student's own answers, token by token: on-policy distillation with discount 0.

    A token's advantage is the teacher's log-probability minus that of the student when it sampled. What a token makes
    of the tokens after it does not count.
    """

    coefficient: float = Field(1.0, gt=0)
    """Multiplies the advantages."""
    clip: float | None = Field(None, gt=0)
    """PPO's clip range of the ratio of probabilities now and when sampled; null never clips."""


class GRPOParams(Params):
    """Group relative policy optimisation: -min(r A, clip(r) A), where A compares completions of one prompt.

    The ratio r is a token's probability now over that when it was sampled.
    """

    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    """What values are divided by. ``grpo``: the tokens of each completion, then the completions, so that tokens of long
    ones count less. ``dapo``: all tokens of the optimiser step. ``dr_grpo``: the completions times constant_length.
    ``bnpo``: all tokens of the micro-batch, so that the gradient depends on how a step is cut."""
    epsilon: float = Field(0.2, gt=0, lt=1)
    """A ratio below 1 - epsilon is not pushed down further."""
    epsilon_high: float | None = Field(None, gt=0)
    """A ratio above 1 + epsilon_high is not pushed up further; epsilon when null. DAPO has 0.28."""
    beta: float = Field(0.0, ge=0)
    """Weight of the k3 estimate of KL(student || reference)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """``sequence``: one ratio for all tokens of a completion, their geometric mean (GSPO). Its authors use it with
    loss_type grpo."""
    delta: float | None = Field(None, gt=1)
    """Bounds the ratio where the advantage is negative, which nothing else does; above 1 + epsilon_high."""
    constant_length: int | None = Field(None, ge=1)
    """For loss_type dr_grpo: what each completion's sum is divided by, such as max_completion_length."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.loss_type == "dr_grpo") != (self.constant_length is not None):
            raise PydanticCustomError("constant_length", "loss_type: dr_grpo, and only it, needs a constant_length")
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and self.delta <= 1 + high:
            raise PydanticCustomError("delta", "delta is above 1 + epsilon_high, where clipping has its bound")
        return self


def _cross_entropy(params: CrossEntropyParams) -> TokenLoss:
    del params
    from kdkit.plugins.losses.token import cross_entropy

    return cross_entropy


def _uld(params: ULDParams) -> AlignedLoss:
    from kdkit.plugins.losses.aligned import ULD

    return ULD(**params.model_dump())


def _hidden(name: str) -> Callable[[HiddenParams], RepresentationLoss]:
    """Builds the class ``name`` of the implementation module."""

    def build(params: HiddenParams) -> RepresentationLoss:
        from kdkit.plugins.losses import hidden

        named: dict[str, list[tuple[int, int]]] = {"even": [], "last": [(-1, -1)]}
        asked = params.layers
        layers = named[asked] if isinstance(asked, str) else [(student, teacher) for student, teacher in asked]
        loss: RepresentationLoss = getattr(hidden, name)(tuple(layers), params.projector)
        return loss

    return build


def _minillm(params: MiniLLMParams) -> PolicyLoss:
    from kdkit.plugins.losses.policy import MiniLLM

    return MiniLLM(**params.model_dump())


def _on_policy_reverse_kl(params: OnPolicyReverseKLParams) -> PolicyLoss:
    from kdkit.plugins.losses.policy import OnPolicyReverseKL

    return OnPolicyReverseKL(**params.model_dump())


def _grpo(params: GRPOParams) -> PolicyLoss:
    from kdkit.plugins.losses.grpo import GRPO

    return GRPO(**params.model_dump())


def _grpo_needs(params: GRPOParams) -> frozenset[PolicyNeed]:
    return frozenset({"reference"}) if params.beta else frozenset()


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
    yield from _hidden_losses()
    yield from _policy_losses()


def _hidden_losses() -> Iterator[LossSpec[Any]]:
    yield LossSpec(
        name="hidden-mse",
        summary="Mean square between hidden states, with trained projectors (TinyBERT)",
        params=HiddenMSEParams,
        build=_hidden("HiddenMSE"),
        loss_kind="representation",
        needs=frozenset({"hidden"}),
    )
    yield LossSpec(
        name="hidden-cosine",
        summary="Cosine between hidden states (DistilBERT)",
        params=HiddenCosineParams,
        build=_hidden("HiddenCosine"),
        loss_kind="representation",
        needs=frozenset({"hidden"}),
    )


def _policy_losses() -> Iterator[LossSpec[Any]]:
    yield LossSpec(
        name="minillm",
        summary="Policy gradient of the sequence-level reverse KL (MiniLLM)",
        params=MiniLLMParams,
        build=_minillm,
        loss_kind="policy",
    )
    yield LossSpec(
        name="on-policy-reverse-kl",
        summary="Per-token reverse KL of sampled tokens as the advantage (on-policy distillation)",
        params=OnPolicyReverseKLParams,
        build=_on_policy_reverse_kl,
        loss_kind="policy",
        policy_needs=frozenset({"teacher"}),
    )
    yield LossSpec(
        name="grpo",
        summary="Clipped policy gradient with group advantages (GRPO, Dr. GRPO, DAPO, GSPO)",
        params=GRPOParams,
        build=_grpo,
        loss_kind="policy",
        policy_needs=_grpo_needs,
    )

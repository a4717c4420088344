"""The one module that training wraps: trunk, output projection and losses in a single forward.

The projection, the losses and their gradient run block by block over valid tokens, so that the [batch, time,
vocabulary] logits of neither model ever exist. Being inside the wrapped forward, the output head takes part in the
gradient hooks of DDP like every other parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import nn

from kdkit.api.data import TokenBatch
from kdkit.api.errors import ModelError
from kdkit.models.heads import split
from kdkit.train.aligned import AlignedSignals
from kdkit.train.blocked import blocked_logprobs, blocked_loss
from kdkit.train.blocks import ALIGNED_COPIES, Block, BlockSizes, block_tokens
from kdkit.train.packing import isolates, unpack
from kdkit.train.policy.terms import PolicyGradient, policy_gradient
from kdkit.train.representation import HiddenStates, Match, add_matches, student_layers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api import TeacherSignals
    from kdkit.api.protocols import Loss
    from kdkit.train.policy.batch import PolicyBatch

__all__ = ["CausalObjective", "LossTerm", "Measured", "block_tokens", "valid_hidden"]

_HALF: Final = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A weighted loss: of tokens, of their hidden states, of groups of tokens aligned with those of a teacher with
    another tokenizer, or of whole completions of the student's own.

    ``vocabulary``: a token loss compares only this many leading entries with the teacher's, and a policy loss has its
    log-probabilities over them; for an aligned loss it is how many entries the teacher has, which the memory of a block
    depends on. ``teacher``: whether a token loss compares with the teacher; it is not asked for logits that no loss
    reads. ``match``: pairs of layers and projectors of a representation loss.
    ``sampled``: on the student's own completions, a token loss compares the distributions that they are sampled from:
    at the temperature of the sampling, and over the tokens that top-k and top-p kept.
    """

    name: str
    weight: float
    loss: Loss
    vocabulary: int | None = None
    kind: Literal["token", "aligned", "policy", "representation"] = "token"
    teacher: bool = True
    match: Match | None = None
    sampled: bool = False

    @property
    def wants_entropy(self) -> bool:
        """Whether a policy loss asks for the entropy of every token, which costs as much as the log-probability."""
        return bool(getattr(self.loss, "wants_entropy", False))


@dataclass(frozen=True, slots=True)
class Measured:
    """What one forward gives.

    Attributes:
        loss: Scalar to call backward on: the weighted sum over valid tokens, groups and completions, scaled.
        sums: [number of losses] detached sums over valid tokens, groups or completions, unweighted and unscaled.
        tokens: Number of valid tokens that count.
        groups: Number of aligned groups.
        counts: For every loss, how many of what it sums over there are: tokens, groups or completions.
        metrics: Sums over the tokens that count, by the names of policy losses and what they call them.
    """

    loss: Tensor
    sums: Tensor
    tokens: int
    groups: int = 0
    counts: tuple[int, ...] = ()
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def valid_hidden(trunk: nn.Module, batch: TokenBatch) -> Tensor:
    """Hidden states that predict the learned tokens, [N, D], in row-major order: position t - 1 for a token at t."""
    out = trunk(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    hidden: Tensor = out.last_hidden_state
    return hidden[:, :-1][batch.labels_mask[:, 1:]]


class CausalObjective(nn.Module):
    """A student with its losses.

    Args:
        model: A causal language model whose output head is a plain linear layer.
        terms: The weighted losses.
        compute: Dtype of matrix products; None computes in the parameters' own dtype (reference tests).
        block: Tokens per block of losses, of which up to four are projected together; both numbers are chosen from
            vocabulary, device and precision by default.

    Raises:
        ModelError: The output head is not a plain linear layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        terms: Sequence[LossTerm],
        *,
        compute: torch.dtype | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.terms = tuple(terms)
        self._parts = split(model)
        head = self._parts.head
        if type(head) is not nn.Linear:
            raise ModelError(
                f"the output head of {type(model).__name__} is a {type(head).__name__}",
                allowed="a plain linear layer",
                hint="merge adapters into the head first",
            )
        # Trained with the student, and no part of the model that is saved.
        self.matches = nn.ModuleList(term.match for term in self.terms if term.match is not None)
        self.matches.to(head.weight.device, head.weight.dtype)
        self._states = HiddenStates(model) if len(self.matches) else None
        self._compute = compute
        self._isolates: bool | None = None
        self._block = block

    def sizes(self) -> BlockSizes:
        """Tokens worked on at once, where the model is now."""
        if self._block is not None:
            return BlockSizes(self._block, 4 * self._block)
        weight = self._parts.head.weight
        others = sum(term.vocabulary or 0 for term in self.terms if term.kind == "aligned")
        if others:  # the teacher's logits are projected for each block of losses, too
            tokens = block_tokens(weight.shape[0] + others, ALIGNED_COPIES)
            return BlockSizes(tokens, tokens)
        return BlockSizes.of(weight.shape[0], weight.device.type, (self._compute or weight.dtype).itemsize)

    def isolates(self) -> bool:
        """Whether the trunk keeps rows apart that lie end to end, measured once: on its device, in its precision."""
        if self._isolates is None:
            device = self._parts.head.weight.device.type
            with torch.autocast(device, self._compute, enabled=self._compute in _HALF):
                self._isolates = isolates(self._parts.trunk)
        return self._isolates

    def forward(
        self,
        batch: TokenBatch,
        signals: TeacherSignals | AlignedSignals | None,
        scale: float,
        group_scale: float = 0.0,
        *,
        terms: Sequence[LossTerm] | None = None,
        policy: PolicyBatch | None = None,
        sequence_scale: float = 0.0,
    ) -> Measured:
        """Weighted loss sums over the batch's valid tokens, groups and completions, each times its scale.

        Args:
            batch: Token ids and masks of the micro-batch; rows laid end to end are padded for a model that would see
                across them.
            signals: The teacher's view of the same valid tokens, or of the same text, when a loss needs one.
            scale: 1 / (valid tokens of the whole optimiser step), times the world size under DDP.
            group_scale: 1 / (aligned groups of the whole optimiser step), times the world size under DDP.
            terms: The losses of this micro-batch; all by default.
            policy: The completions that the valid tokens are of. Those that do not count are in no sum.
            sequence_scale: 1 / (completions of the whole optimiser step that count), times the world size under DDP.
        """
        if batch.attention_mask is None and not self.isolates():
            batch = unpack(batch)
        terms = self.terms if terms is None else tuple(terms)
        hidden, states = self._hidden(batch, terms)
        labels = batch.input_ids[:, 1:][batch.labels_mask[:, 1:]]
        asked = signals if any(term.teacher for term in terms if term.kind != "representation") else None
        block = Block(terms, (1.0,) * len(terms), labels, asked, self._parts.transform, policy)
        gradients = self._policy_gradients(hidden, block)
        units = [term.kind if found is None else found.per for term, found in zip(terms, gradients, strict=True)]
        scales = {"token": scale, "representation": scale, "aligned": group_scale, "sequence": sequence_scale}
        block = replace(block, ratios=tuple(scales[unit] / scale for unit in units), gradients=gradients)
        loss, sums = self._blocked(hidden, block)
        groups = signals.groups if isinstance(signals, AlignedSignals) else 0
        tokens = int(labels.shape[0]) if policy is None else policy.tokens
        counts = {"token": tokens, "representation": tokens, "aligned": groups}
        counts["sequence"] = 0 if policy is None else policy.sequences
        measured = Measured(loss * scale, sums, tokens, groups, tuple(counts[unit] for unit in units))
        measured = _with_values(measured, block, scale)
        weights = None if policy is None else policy.weights
        return add_matches(measured, terms, states, signals, scale, weights=weights, compute=self._compute)

    def _hidden(self, batch: TokenBatch, terms: Sequence[LossTerm]) -> tuple[Tensor, dict[int, Tensor]]:
        """[N, D] hidden states that predict the learned tokens, and those of the layers that losses compare."""
        layers = student_layers(terms)
        with torch.autocast(batch.input_ids.device.type, self._compute, enabled=self._compute in _HALF):
            if self._states is None or not layers:
                return valid_hidden(self._parts.trunk, batch), {}
            with self._states.keep(layers) as kept:
                hidden = valid_hidden(self._parts.trunk, batch)
        return hidden, self._states.of_tokens(kept, hidden, batch, layers)

    def _blocked(self, hidden: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Loss and sums of what the logits decide; they are not made when nothing reads them."""
        if all(term.kind == "representation" for term in block.terms):
            zero = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
            return zero, zero.new_zeros(len(block.terms))
        return blocked_loss(hidden, self._parts.head, block, self.sizes(), self._compute)

    def _policy_gradients(self, hidden: Tensor, block: Block) -> tuple[PolicyGradient | None, ...]:
        """Pass one: the value and the gradient of every policy loss, on the log-probabilities of the taken tokens."""
        if all(term.kind != "policy" for term in block.terms):
            return (None,) * len(block.terms)
        head = self._parts.head
        dtype = self._compute or head.weight.dtype
        taken = iter(blocked_logprobs(hidden, head, block, self.sizes(), dtype))
        return tuple(
            policy_gradient(term, block.policy, next(taken), block.labels)
            if term.kind == "policy" and block.policy is not None
            else None
            for term in block.terms
        )


def _with_values(measured: Measured, block: Block, scale: float) -> Measured:
    """Values of the policy losses, whose blocks have given the gradient alone."""
    if all(found is None for found in block.gradients):
        return measured
    loss, sums = measured.loss, measured.sums.clone()
    metrics: dict[str, Tensor] = {}
    for index, (term, ratio, found) in enumerate(zip(block.terms, block.ratios, block.gradients, strict=True)):
        if found is not None:
            loss = loss + term.weight * ratio * scale * found.value
            sums[index] = found.value
            metrics |= {f"{term.name}/{name}": value for name, value in found.metrics.items()}
    return replace(measured, loss=loss, sums=sums, metrics=metrics)

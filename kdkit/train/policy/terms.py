"""Policy losses without the logits of a whole completion.

A policy loss sees completions, the projection sees blocks of tokens. So the blocks are walked twice: once without a
gradient for the log-probabilities of the taken tokens, on which the loss is called and differentiated; and once more
with the gradient of sum(g_i * logprob_i + h_i * entropy_i), which is the loss's own by the chain rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from kdkit.api.data import PolicyLossOutput
from kdkit.api.errors import ConformanceError

if TYPE_CHECKING:
    from torch import Tensor

    from kdkit.train.objective import LossTerm
    from kdkit.train.policy.batch import PolicyBatch

__all__ = ["PolicyGradient", "Taken", "policy_gradient", "taken_logprobs"]


@dataclass(frozen=True, slots=True)
class Taken:
    """[n] log-probabilities of the tokens that were taken, and [n] entropies of what they were taken from."""

    logprobs: Tensor
    entropy: Tensor | None = None


def taken_logprobs(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, kept: Tensor | None = None, entropy: bool = False
) -> Taken:
    """Log-probabilities in nats, the one way they are taken wherever they are compared.

    Args:
        logits: [n, V] at least float32.
        labels: [n] the taken tokens.
        temperature: Of the sampling.
        kept: [n, V] bool; the distribution is that over these entries.
        entropy: Whether the entropy is wanted.
    """
    scores = logits / temperature
    if kept is not None:
        scores = scores.masked_fill(~kept, -torch.inf)
    log_q = torch.log_softmax(scores, dim=-1)
    taken = log_q.gather(-1, labels[:, None])[:, 0]
    if not entropy:
        return Taken(taken)
    # 0 log 0 = 0, with a gradient that is 0, too.
    finite = log_q.masked_fill(log_q == -torch.inf, 0.0)
    return Taken(taken, -(log_q.exp() * finite).sum(dim=-1))


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """A policy loss of a micro-batch.

    Attributes:
        value: Scalar, before it is divided by what the whole optimiser step has of ``per``.
        logprobs: [N] its derivative with respect to every taken token's log-probability.
        entropy: [N] with respect to every entropy; None when the loss does not use it.
        per: What the value is divided by: tokens or completions that count.
        metrics: Sums over the tokens that count.
    """

    value: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    per: Literal["token", "sequence"]
    metrics: Mapping[str, Tensor]


def policy_gradient(term: LossTerm, policy: PolicyBatch, taken: Taken, labels: Tensor) -> PolicyGradient:
    """Call a policy loss on all completions of a micro-batch, and differentiate it.

    Raises:
        ConformanceError: The loss returns another shape, an unknown aggregation, or no length to divide by.
    """
    leaves = [policy.padded(flat).requires_grad_() for flat in (taken.logprobs, taken.entropy) if flat is not None]
    with torch.enable_grad():
        x = policy.inputs(leaves[0], leaves[1] if len(leaves) > 1 else None, labels)
        out = term.loss(x)
        _check(out, leaves[0], term.name)
        value = _aggregate(out, x.mask)
        grads = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else (None, None)
    # What is masked may be anything, also infinite; 0 times that is not 0.
    flat = [None if grad is None else policy.flat(torch.where(x.mask, grad, 0.0)) for grad in grads]
    return PolicyGradient(
        value=value.detach(),
        logprobs=torch.zeros_like(taken.logprobs) if flat[0] is None else flat[0],
        entropy=flat[1] if len(leaves) > 1 else None,
        per="token" if out.aggregation == "token-mean" else "sequence",
        metrics={name: sums.detach() for name, sums in out.metrics.items()},
    )


def _aggregate(out: PolicyLossOutput, mask: Tensor) -> Tensor:
    """The sum over a micro-batch's completions whose denominator counts tokens or completions."""
    per_sequence = torch.where(mask, out.per_token, 0.0).sum(dim=1)
    if out.aggregation == "sequence-mean":
        per_sequence = per_sequence / mask.sum(dim=1).clamp_min(1)
    if out.aggregation == "constant-length":
        per_sequence = per_sequence / float(out.constant_length or 1)
    return per_sequence.sum()


def _check(out: PolicyLossOutput, logprobs: Tensor, name: str) -> None:
    if out.per_token.shape != logprobs.shape:
        raise ConformanceError(
            f"a policy loss returns one value per token {tuple(logprobs.shape)}, got {tuple(out.per_token.shape)}",
            where=f"loss {name}",
        )
    if out.aggregation not in {"token-mean", "sequence-mean", "constant-length"}:
        raise ConformanceError(
            f"a policy loss cannot be aggregated by {out.aggregation!r}",
            where=f"loss {name}",
            allowed="token-mean, sequence-mean, constant-length",
        )
    if out.aggregation == "constant-length" and not out.constant_length:
        raise ConformanceError("constant-length needs a constant_length", where=f"loss {name}")

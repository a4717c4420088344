"""The next token: temperature, top-k, top-p, mixtures of two models, and one random number per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from kdkit.train.divergences import upcast

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api import Sampling

__all__ = ["Drawn", "Mixture", "cuts", "draw", "next_tokens", "warp"]

_NUCLEUS: Final = 1024
"""Most probable tokens that are sorted at first; a nucleus that needs more sorts the whole vocabulary."""
_CHUNK: Final = 256
"""Entries summed at once when a draw looks for its place."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A second model that takes part in every draw: (1 - alpha) q + alpha p (MiniLLM, Gu et al. 2024, section 2.2).

    Both distributions are over the same leading ids and at the same temperature. Top-k and top-p say which tokens the
    model that decodes keeps; the other one is restricted to the same tokens and renormalised. Were it cut by its own
    rule, tokens could be drawn that the first model gives no probability, and no importance weight corrects that.

    Attributes:
        model: The teacher, in evaluation mode and on the device of the model that decodes.
        alpha: Its share, from 0 to 1.
    """

    model: PreTrainedModel
    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a share from 0 to 1, got {self.alpha}")


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits [N, V] whose softmax is sampled from, in float32 at least; differentiable where tokens are kept.

    Temperature first, then top-k, then top-p of what is left; dropped tokens become -inf. All tokens that tie with the
    last one kept are kept. Greedy decoding is not warped: its probabilities are those of the model.
    """
    scores = upcast(logits)
    if not sampling.do_sample:
        return scores
    if sampling.temperature != 1.0:
        scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        bound = scores.detach().topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < bound, -torch.inf)
    if sampling.top_p < 1.0:
        scores = scores.masked_fill(scores < _nucleus(scores.detach(), sampling.top_p), -torch.inf)
    return scores


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """[N, 1]: score of the last token of the smallest set that has ``top_p`` of the probability."""
    total = scores.logsumexp(dim=-1, keepdim=True)
    width = min(_NUCLEUS, scores.shape[-1])
    while True:
        top = scores.topk(width, dim=-1).values
        mass = (top - total).exp().double()
        # A token belongs to the nucleus when those before it are too few.
        count = (mass.cumsum(dim=-1) - mass < top_p).sum(dim=-1, keepdim=True)
        if width == scores.shape[-1] or bool((count < width).all()):
            return top.gather(-1, count - 1)
        width = scores.shape[-1]


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One index per row of ``weights`` [B, V] (not negative, any sum), at the numbers ``uniform`` [B] in [0, 1).

    The cumulative distribution is inverted at one number per row: noise for every entry (Gumbel's way) costs twice as
    much. Sums are float64, as in float32 the last of many entries would be too small to be added; first over chunks,
    then within the chunk that is hit, as a float64 copy of the weights would cost more than all the rest.
    """
    rows, size = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -size % _CHUNK)).view(rows, -1, _CHUNK)
    sums = padded.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = uniform.to(weights.device).unsqueeze(1) * sums[:, -1:]
    chunk = _place(sums, target)
    before = sums.gather(1, (chunk - 1).clamp(min=0)) * (chunk > 0)
    inside = padded.gather(1, chunk.unsqueeze(-1).expand(-1, 1, _CHUNK))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    return (chunk * _CHUNK + _place(inside, target - before))[:, 0]


def _place(cumulative: Tensor, target: Tensor) -> Tensor:
    """[B, 1]: the first entry whose cumulative sum is above the target, which rounding may have put at the very end."""
    last = torch.nextafter(cumulative[:, -1:], cumulative.new_zeros(()))
    return torch.searchsorted(cumulative, torch.minimum(target, last), right=True)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The next tokens of B rows.

    Attributes:
        tokens: [B] int64.
        logprobs: [2, B] in nats, of the model and as it was drawn; None unless asked for.
        kept: [B, V] bool, what top-k and top-p of the model kept; None unless asked for, or when they keep all.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    kept: Tensor | None = None


def cuts(sampling: Sampling) -> bool:
    """Whether top-k or top-p may leave tokens out."""
    return sampling.do_sample and (sampling.top_k > 0 or sampling.top_p < 1.0)


def next_tokens(
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    *,
    other: tuple[Tensor, float] | None = None,
    logprobs: bool = False,
    support: bool = False,
) -> Drawn:
    """Next token of every row.

    Args:
        logits: [B, V] of the model.
        sampling: Decoding parameters; greedy takes the most probable token (of the mixture).
        generators: One per row; a token depends on its own row's only.
        other: Logits [B, V] and share of the model that is mixed in.
        logprobs: Whether they are wanted.
        support: Whether the kept tokens are wanted.
    """
    if other is None and not sampling.do_sample and not logprobs:
        return Drawn(logits.argmax(dim=-1))
    scores = warp(logits, sampling)
    kept = scores > -torch.inf if cuts(sampling) else None
    if other is None and not sampling.do_sample:
        tokens = scores.argmax(dim=-1)
    else:
        weights = scores.softmax(dim=-1)
        if other is not None:
            weights = torch.lerp(weights, _within(other[0], sampling, kept).softmax(dim=-1), other[1])
        tokens = draw(weights, _uniform(generators)) if sampling.do_sample else weights.argmax(dim=-1)
    values = None
    if logprobs:
        taken = tokens.unsqueeze(1)
        own = (scores.gather(1, taken) - scores.logsumexp(dim=-1, keepdim=True))[:, 0]
        values = torch.stack([own, own if other is None else weights.gather(1, taken)[:, 0].log()])
    return Drawn(tokens, values, kept if support else None)


def _within(logits: Tensor, sampling: Sampling, kept: Tensor | None) -> Tensor:
    """The other model's logits at the same temperature, -inf where the first one keeps nothing."""
    scores = upcast(logits) / sampling.temperature if sampling.do_sample else upcast(logits)
    return scores if kept is None else scores.masked_fill(~kept, -torch.inf)


def _uniform(generators: Sequence[torch.Generator]) -> Tensor:
    return torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])[:, 0]

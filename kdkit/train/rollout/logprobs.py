"""Log-probabilities of tokens that were decoded, recomputed with the forward pass of training.

Decoding multiplies matrices of other shapes, which round differently, so its own log-probabilities are not those that a
policy gradient starts from. :func:`mismatch` tells how far they are apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from kdkit.models.chat import Encoded
from kdkit.models.heads import CausalParts, split
from kdkit.train.logits import logit_blocks
from kdkit.train.objective import block_tokens, valid_hidden
from kdkit.train.packing import isolates, pack, unpack
from kdkit.train.policy.terms import Taken, taken_logprobs
from kdkit.train.rollout.sampling import warp

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from kdkit.api import Sampling, TokenBatch

__all__ = ["Mismatch", "TokenLogprobs", "mismatch", "token_logprobs"]

_FAR: Final = 0.1
"""Nats from which a token counts as decoded with another probability."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of every completion, per token, [length] float32 (float64 for a float64 model) on the CPU.

    Attributes:
        logprobs: In nats; -inf for a token outside of top-k or top-p.
        entropy: Of the same distributions, in nats; None unless asked for.
    """

    logprobs: tuple[Tensor, ...]
    entropy: tuple[Tensor, ...] | None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far log-probabilities of decoding are from recomputed ones, over all tokens.

    Attributes:
        mean: Of the absolute differences in nats, where both are finite.
        max: The largest of them.
        far: Share of tokens above 0.1 nat. A token that only one of both could take (top-k and top-p cut where the
            rounding says) counts as far.
    """

    mean: float
    max: float
    far: float

    def metrics(self) -> dict[str, float]:
        """For a log line."""
        names = ("mismatch_mean", "mismatch_max", "mismatch_far")
        return dict(zip(names, (self.mean, self.max, self.far), strict=True))


def mismatch(decoded: Sequence[Sequence[float]], recomputed: Sequence[Tensor]) -> Mismatch:
    """Compare ``Decoded.logprobs`` with ``TokenLogprobs.logprobs`` of the same completions."""
    a = torch.tensor([value for row in decoded for value in row], dtype=torch.float64)
    b = torch.cat([torch.zeros(0, dtype=torch.float64), *(row.double() for row in recomputed)])
    both = a.isfinite() & b.isfinite()
    gap = (a - b)[both].abs()
    if not len(a):
        return Mismatch(0.0, 0.0, 0.0)
    outside = int((a.isfinite() ^ b.isfinite()).sum())
    far = (int((gap > _FAR).sum()) + outside) / len(a)
    return Mismatch(float(gap.mean()), float(gap.max()), far) if len(gap) else Mismatch(0.0, 0.0, far)


@torch.no_grad()
def token_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    vocabulary: int | None = None,
    compute: torch.dtype | None = None,
    entropy: bool = False,
    packed: bool | None = None,
    batch_tokens: int = 8192,
) -> TokenLogprobs:
    """Log-probabilities of the tokens of ``completions`` after their prompts, with the forward pass of training.

    Args:
        model: In evaluation mode.
        prompts: Token ids, at least one each.
        completions: Token ids, any number.
        sampling: Warp as in decoding; None takes the softmax as it is.
        vocabulary: Leading ids that were chosen from; all when None.
        compute: Precision of matrix products, as in training; None computes in that of the parameters.
        entropy: Whether to compute it as well.
        packed: Whether rows may lie end to end; measured when None.
        batch_tokens: Tokens of a forward pass, unless a single row has more.
    """
    parts, device = split(model), model.device
    half = compute in {torch.bfloat16, torch.float16}
    empty = torch.zeros(0, dtype=torch.float64 if model.dtype == torch.float64 else torch.float32)
    done: dict[int, tuple[Tensor, Tensor]] = {}
    rows = [_row(i, *both) for i, both in enumerate(zip(prompts, completions, strict=True)) if both[1]]
    with torch.autocast(device.type, compute, enabled=half):
        if packed is None:
            packed = isolates(parts.trunk)
        for chosen in _batches(rows, batch_tokens):
            batch = pack(chosen, limit=batch_tokens, device=device)
            values = _values(parts, batch if packed else unpack(batch), sampling, vocabulary, compute, entropy=entropy)
            order = [int(name) for name in batch.example_ids]
            sizes = [len(completions[i]) for i in order]
            pairs = zip(values[0].cpu().split(sizes), values[1].cpu().split(sizes), strict=True)
            done.update(zip(order, pairs, strict=True))
    every = [done.get(i, (empty, empty)) for i in range(len(prompts))]
    return TokenLogprobs(tuple(a for a, _ in every), tuple(b for _, b in every) if entropy else None)


def _row(index: int, prompt: Sequence[int], completion: Sequence[int]) -> Encoded:
    learned = (*(False for _ in prompt), *(True for _ in completion))
    return Encoded(str(index), (*prompt, *completion), learned)


def _batches(rows: Sequence[Encoded], tokens: int) -> Iterator[list[Encoded]]:
    """Rows of similar length, the longest first, as many as have the tokens together."""
    chosen: list[Encoded] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if chosen and sum(len(other.ids) for other in chosen) + len(row.ids) > tokens:
            yield chosen
            chosen = []
        chosen.append(row)
    if chosen:
        yield chosen


def _values(
    parts: CausalParts,
    batch: TokenBatch,
    sampling: Sampling | None,
    vocabulary: int | None,
    compute: torch.dtype | None,
    *,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of all learned tokens of a batch; the latter are zero when not wanted."""
    hidden, labels = valid_hidden(parts.trunk, batch), batch.input_ids[:, 1:][batch.labels_mask[:, 1:]]
    weight = parts.head.weight
    made: list[Taken] = []
    for start, logits in logit_blocks(hidden, parts, block_tokens(weight.shape[0]), compute or weight.dtype):
        cut = logits[:, :vocabulary]
        scores = cut if sampling is None else warp(cut, sampling)
        made.append(taken_logprobs(scores, labels[start : start + len(scores)], entropy=entropy))
    spread = [torch.zeros_like(part.logprobs) if part.entropy is None else part.entropy for part in made]
    return torch.cat([part.logprobs for part in made]), torch.cat(spread)

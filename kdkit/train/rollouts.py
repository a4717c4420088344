"""Batched generation with a KV cache, used by rollout engines, local teachers and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.func import functional_call
from transformers import DynamicCache, LogitsProcessor
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kdkit.api.data import Completion
from kdkit.models.heads import split

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdkit.api import Sampling
    from kdkit.models.chat import ChatEncoder

__all__ = ["generate", "generate_ids", "stop_ids"]


def stop_ids(model: PreTrainedModel, encoder: ChatEncoder) -> tuple[int, ...]:
    """Ids that end an answer: those of tokenizer and chat template, and those the model itself names."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    own = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(dict.fromkeys([*encoder.stop_ids(), *own]))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    stop_ids: Sequence[int],
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[Completion]:
    """One completion per prompt, in the order of ``prompts``.

    Args:
        model: In evaluation mode (dropout must be off).
        tokenizer: For decoding; special tokens are left out of the text.
        prompts: Token ids.
        sampling: Decoding parameters; the model's own defaults do not leak in.
        seeds: One per prompt; unused when decoding greedily.
        stop_ids: Ids that end a completion; they are not part of its text.
        batch_size: Prompts decoded together, grouped by length.
        on_batch: Called with the number of finished prompts after every batch.
    """
    answers = generate_ids(model, prompts, sampling, seeds, stop_ids=stop_ids, batch_size=batch_size, on_batch=on_batch)
    return [_completion(row, tokenizer, stop_ids) for row in answers]


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    stop_ids: Sequence[int],
    batch_size: int,
    max_length: int | None = None,
    vocabulary: int | None = None,
    compute: torch.dtype | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """New token ids of every prompt, in the order of ``prompts``, with the id of ``stop_ids`` that ended them.

    Args:
        model: See :func:`generate`, as for the arguments that are not named here.
        prompts: Token ids.
        sampling: Decoding parameters.
        seeds: One per prompt.
        stop_ids: Ids that end an answer.
        batch_size: Prompts decoded together, grouped by length.
        max_length: Bound of prompt and answer together; longer than every prompt.
        vocabulary: Choose among this many leading ids only.
        compute: Precision of the weights while decoding; the parameters themselves stay as they are.
        on_batch: Called with the number of finished prompts after every batch.
    """
    limits = [
        sampling.max_new_tokens if max_length is None else min(sampling.max_new_tokens, max_length - len(prompt))
        for prompt in prompts
    ]
    decoder = _Decoder(model, sampling, stop_ids, vocabulary)
    weights = _cast(decoder, compute)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        parts = ([values[i] for i in chosen] for values in (prompts, seeds, limits))
        done.update(zip(chosen, functional_call(decoder, weights, tuple(parts)), strict=True))
        if on_batch:
            on_batch(len(done))
    return [done[i] for i in range(len(prompts))]


@torch.no_grad()
def _cast(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies in ``dtype`` of the parameters that have another floating type; a tied one is copied once.

    Autocast would copy them as well, and leave half of the cache in float32.
    """
    return {
        name: parameter.to(dtype)
        for name, parameter in module.named_parameters()
        if dtype is not None and parameter.is_floating_point() and parameter.dtype != dtype
    }


class _Decoder(nn.Module):
    """The decoding loop as a module, so that it can run once with other weights than the model's own."""

    def __init__(
        self, model: PreTrainedModel, sampling: Sampling, stop_ids: Sequence[int], vocabulary: int | None
    ) -> None:
        super().__init__()
        self.model = model
        self._sampling, self._stop_ids, self._vocabulary = sampling, frozenset(stop_ids), vocabulary

    @torch.no_grad()
    def forward(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], limits: Sequence[int]) -> list[list[int]]:
        """New token ids of every prompt, the stop id included. Rows leave the batch as soon as they end."""
        parts = split(self.model)
        ids, mask = _left_padded(prompts, self.model.device)
        cache = DynamicCache(config=self.model.config)
        out: list[list[int]] = [[] for _ in prompts]
        alive = list(range(len(prompts)))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        while True:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            hidden = parts.trunk(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
            # Only the last position is projected, as a matrix: a [B, 1, D] slice would copy the head once a row.
            logits = parts.project(hidden[:, -1])[:, : self._vocabulary]
            chosen = _choose(logits, self._sampling, [generators[i] for i in alive])
            for row, token in zip(alive, chosen.tolist(), strict=True):
                out[row].append(token)
            going = [i for i, row in enumerate(alive) if self._goes_on(out[row], limits[row])]
            if not going:
                return out
            ids, mask = chosen.unsqueeze(1), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            if len(going) < len(alive):
                keep = torch.tensor(going, device=ids.device)
                ids, mask, alive = ids[keep], mask[keep], [alive[i] for i in going]
                cache.batch_select_indices(keep)

    def _goes_on(self, row: list[int], limit: int) -> bool:
        return len(row) < limit and row[-1] not in self._stop_ids


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        ids[index, width - len(prompt) :] = torch.tensor(prompt)
        mask[index, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Next token of every row, [B]: the most probable one, or a draw.

    A draw inverts the cumulative distribution at one uniform number per row, from a generator per row, so that a
    completion does not depend on the batch it was decoded in. Noise for every entry (Gumbel's way) costs twice as much.
    """
    if not sampling.do_sample:
        return logits.argmax(dim=-1)
    scores = logits.float()
    for warper in _warpers(sampling):
        scores = warper(torch.empty(0), scores)
    # Summed in float64: in float32 the last of many entries would be too small to be added.
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(scores.device)
    chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=scores.shape[-1] - 1)


def _warpers(sampling: Sampling) -> Iterator[LogitsProcessor]:
    if sampling.temperature != 1.0:
        yield TemperatureLogitsWarper(sampling.temperature)
    if sampling.top_k:
        yield TopKLogitsWarper(sampling.top_k)
    if sampling.top_p < 1.0:
        yield TopPLogitsWarper(sampling.top_p)


def _completion(row: list[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Completion:
    """Cut at the first stop id; without one the completion hit the token limit."""
    end = next((i for i, token in enumerate(row) if token in stop_ids), None)
    kept = row if end is None else row[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Completion(str(text), tuple(kept), truncated=end is None)

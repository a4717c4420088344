"""Batched generation with a KV cache, used by rollout engines, local teachers and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
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

__all__ = ["generate", "stop_ids"]


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
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = _decode(model, [prompts[i] for i in chosen], sampling, [seeds[i] for i in chosen], stop_ids)
        for index, row in zip(chosen, ids, strict=True):
            done[index] = _completion(row, tokenizer, stop_ids)
        if on_batch:
            on_batch(len(done))
    return [done[i] for i in range(len(prompts))]


@torch.no_grad()
def _decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """New token ids of every prompt, the stop id included. Rows leave the batch as soon as they end."""
    parts = split(model)
    ids, mask = _left_padded(prompts, model.device)
    cache = DynamicCache(config=model.config)
    out: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(sampling.max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        hidden = parts.trunk(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        # Only the last position is projected, as a matrix: a [B, 1, D] slice would copy the head once a row.
        chosen = _choose(parts.project(hidden[:, -1]), sampling, [generators[i] for i in alive])
        for row, token in zip(alive, chosen.tolist(), strict=True):
            out[row].append(token)
        going = [i for i, row in enumerate(alive) if out[row][-1] not in stop_ids]
        if not going:
            break
        ids, mask = chosen.unsqueeze(1), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if len(going) < len(alive):
            keep = torch.tensor(going, device=ids.device)
            ids, mask, alive = ids[keep], mask[keep], [alive[i] for i in going]
            cache.batch_select_indices(keep)
    return out


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

    A draw is argmax(logits + Gumbel noise) with a generator per row, so that a completion does not depend on the batch
    it was decoded in.
    """
    if not sampling.do_sample:
        return logits.argmax(dim=-1)
    scores = logits.float()
    for warper in _warpers(sampling):
        scores = warper(torch.empty(0), scores)
    noise = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=g).log_() for g in generators])
    return (scores - noise.to(scores.device)).argmax(dim=-1)


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

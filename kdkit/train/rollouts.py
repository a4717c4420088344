"""Batched generation with a KV cache, used by rollout engines, local teachers and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kdkit.api.data import Completion

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdkit.api import Sampling

__all__ = ["generate"]


class _GumbelNoise(LogitsProcessor):
    """Turns greedy decoding into sampling: argmax(logits + Gumbel noise) draws from softmax(logits).

    Every row has its own generator, so that its completion does not depend on the batch it was decoded in.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        del input_ids
        width = scores.shape[-1]
        noise = torch.stack([torch.empty(width).exponential_(generator=g).log_() for g in self._generators])
        return scores.float() - noise.to(scores.device)


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
    width = max(len(p) for p in prompts)
    filler = stop_ids[0] if stop_ids else 0
    ids = torch.full((len(prompts), width), filler, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        ids[index, width - len(prompt) :] = torch.tensor(prompt)
        mask[index, width - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=_config(sampling, filler, stop_ids),
        logits_processor=LogitsProcessorList(_processors(sampling, seeds)),
    )
    rows: list[list[int]] = out[:, width:].tolist()
    return rows


def _config(sampling: Sampling, filler: int, stop_ids: Sequence[int]) -> GenerationConfig:
    # Sampling happens in our processors, one generator a row; the model's own defaults are overruled by name.
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        pad_token_id=filler,
        eos_token_id=list(stop_ids) or None,
    )


def _processors(sampling: Sampling, seeds: Sequence[int]) -> Iterator[LogitsProcessor]:
    if not sampling.do_sample:
        return
    if sampling.temperature != 1.0:
        yield TemperatureLogitsWarper(sampling.temperature)
    if sampling.top_k:
        yield TopKLogitsWarper(sampling.top_k)
    if sampling.top_p < 1.0:
        yield TopPLogitsWarper(sampling.top_p)
    yield _GumbelNoise(seeds)


def _completion(row: list[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Completion:
    """Cut at the first stop id; without one the completion hit the token limit."""
    end = next((i for i, token in enumerate(row) if token in stop_ids), None)
    kept = row if end is None else row[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Completion(str(text), tuple(kept), truncated=end is None)

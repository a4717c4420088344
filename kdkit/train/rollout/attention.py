"""Attention of one new token per row, where every row reads about as many slots as it has.

A batched kernel reads as many slots of every row as the longest one has. On a CPU that is most of the time of a step
once lengths differ: 62 % of it for 64 rows of SmolLM2-135M in bf16, one of 400 tokens and the others of 20. Here spans
of neighbouring rows are attended to one after the other. GPUs take all rows at once, as launching a kernel costs them
more than reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kdkit.train.rollout.spans import Span, spans

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["plan", "reads_spans", "spanned"]

_NAME: Final = "kdkit-spans"
_CHOICE: Final = "_attn_implementation"
"""Attribute of a configuration: every layer looks up there, at every call, how to attend."""
_SPANS: Final = "kdkit_spans"
"""Attribute of the keys that a cache returns: attention functions get nothing else from it."""
_SLACK: Final = 200
"""Slots that are read in about the time that one more call takes: 0.1 us a slot in a profile of SmolLM2-135M in bf16 on
two cores, against an assumed 20 us a call."""


def plan(lengths: Sequence[int], device: torch.device) -> list[Span]:
    """Spans for rows that have this many slots each; a single one is not worth the detour."""
    return spans(lengths, _SLACK) if device.type == "cpu" else []


def spanned(keys: Tensor, found: Sequence[Span]) -> Tensor:
    """The keys [B, heads, slots, size], with the spans for :func:`_attend`."""
    if len(found) > 1:
        setattr(keys, _SPANS, found)
    return keys


@contextmanager
def reads_spans(config: Any) -> Iterator[None]:
    """Within it, models of this configuration that use sdpa attend by spans where their cache gives some."""
    if getattr(config, _CHOICE) != "sdpa":
        # Of another kind, or chosen by a step of another thread, which puts it back.
        yield
        return
    setattr(config, _CHOICE, _NAME)
    try:
        yield
    finally:
        setattr(config, _CHOICE, "sdpa")


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """[B, 1, heads, size]: as transformers' sdpa for each span."""
    found: Sequence[Span] = getattr(key, _SPANS, ())
    if not found or attention_mask is None or how.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    parts = [
        sdpa_attention_forward(
            module,
            query[start:stop],
            key[start:stop, :, :width],
            value[start:stop, :, :width],
            attention_mask[start:stop, ..., :width],
            **how,
        )[0]
        for start, stop, width in found
    ]
    return torch.cat(parts), None


AttentionInterface.register(_NAME, _attend)

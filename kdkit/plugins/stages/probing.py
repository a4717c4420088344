"""Load time, and tokens a second of one model on its own: reading a prompt (prefill) and writing (decode)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import torch

from kdkit.api import Sampling
from kdkit.plugins.stages.questions import prompt_ids
from kdkit.train.rollout import generate_ids

if TYPE_CHECKING:
    from kdkit.api import Example
    from kdkit.plugins.stages.plugin import EvaluateParams
    from kdkit.plugins.stages.subjects import Subject

__all__ = ["probe"]

_PROMPT: Final = 256
"""Tokens of the prompt; fewer for a model with fewer positions."""
_WRITTEN: Final = 16
_TRIES: Final = 2
"""The fastest counts: whatever else runs on the machine only ever adds time."""


def probe(subject: Subject, data: Mapping[str, Sequence[Example]], params: EvaluateParams) -> dict[str, float | None]:
    """``load_seconds``, ``prefill_tokens_per_s`` and ``decode_tokens_per_s``, for one prompt at a time.

    The prompt is the first ones of the data, end to end, as often as it takes; None where the clock saw nothing.
    """
    prompts = (prompt_ids(subject.encoder, dataset, rows[:8], params) for dataset, rows in data.items())
    ids = [token for of_dataset in prompts for prompt in of_dataset for token in prompt]
    positions = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    length = min(_PROMPT, max(1, int(positions) - _WRITTEN - 1)) if positions else _PROMPT
    prompt = (ids * (length // len(ids) + 1))[:length]
    # The first token comes out of the prompt itself.
    reading = min(_seconds(subject, prompt, 1) for _ in range(_TRIES))
    both = min(_seconds(subject, prompt, 1 + _WRITTEN) for _ in range(_TRIES))
    return {
        "load_seconds": subject.load_seconds,
        "prefill_tokens_per_s": length / reading if reading > 0 else None,
        "decode_tokens_per_s": _WRITTEN / (both - reading) if both > reading else None,
    }


def _seconds(subject: Subject, prompt: Sequence[int], tokens: int) -> float:
    started = time.perf_counter()
    generate_ids(subject.model, [prompt], Sampling(max_new_tokens=tokens), [0], stop_ids=(), batch_size=1)
    if subject.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started

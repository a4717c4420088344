"""Calibration rows as token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel

from kdkit.api import DataError, Example
from kdkit.models.chat import ChatEncoder
from kdkit.models.pretrained import read_config, read_tokenizer

__all__ = ["calibration_rows", "check_tokens"]

_SHORTEST: Final = 8
"""Tokens of a row that is worth calibrating with."""


def calibration_rows(
    examples: Sequence[Example], model_dir: Path, *, max_length: int, log: Callable[[str], None]
) -> list[torch.Tensor]:
    """Prompt and answer of every example as the model is trained on them, each [T] int64.

    Raises:
        DataError: No row has enough tokens.
    """
    positions = getattr(read_config(model_dir).get_text_config(), "max_position_embeddings", None)
    length = min(max_length, positions) if isinstance(positions, int) else max_length
    encoder = ChatEncoder(read_tokenizer(model_dir))
    rows = []
    for example in examples:
        ids = list(encoder.training(example).ids) if example.completion else encoder.prompt(example)
        if len(ids) >= _SHORTEST:
            rows.append(torch.tensor(ids[:length]))
    dropped = len(examples) - len(rows)
    if not rows:
        what = f"no row is left of {len(examples)} to calibrate with: {dropped} have fewer than {_SHORTEST} tokens"
        raise DataError(what, where="calibration", hint="give longer texts")
    log(f"calibration: {len(rows):,} rows, {sum(map(len, rows)):,} tokens" + (f"; {dropped} too short" * bool(dropped)))
    return rows


def check_tokens(rows: Sequence[torch.Tensor], model: PreTrainedModel) -> None:
    """Refuse tokens that the model has no embedding for."""
    known = int(model.get_input_embeddings().weight.shape[0])
    largest = max(int(row.max()) for row in rows)
    if largest >= known:
        raise DataError(
            f"token {largest} is unknown to the model, which has {known}",
            where="calibration",
            hint="the tokenizer does not belong to the model",
        )

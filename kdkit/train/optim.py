"""AdamW and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from kdkit.train.params import OptimParams

if TYPE_CHECKING:
    from torch import nn

__all__ = ["adamw", "learning_rate"]


def learning_rate(step: int, total: int, params: OptimParams) -> float:
    """The learning rate of the step with index ``step`` (from 0) out of ``total``.

    A function of its arguments, so that nothing has to be saved: linear warm-up over ``warmup_ratio * total`` steps,
    then constant, linear or cosine down to ``min_learning_rate``.
    """
    warmup = math.ceil(params.warmup_ratio * total)
    if step < warmup:
        return params.learning_rate * (step + 1) / warmup
    if params.lr_scheduler_type == "constant":
        return params.learning_rate
    done = (step - warmup) / max(1, total - warmup)
    left = 1 - done if params.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2
    return params.min_learning_rate + (params.learning_rate - params.min_learning_rate) * left


def adamw(module: nn.Module, params: OptimParams) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices are decayed, vectors (biases, norms) are not."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": params.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=params.learning_rate,
        betas=(params.adam_beta1, params.adam_beta2),
        eps=params.adam_epsilon,
        fused=True,
    )

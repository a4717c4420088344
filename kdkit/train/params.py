"""Parameters shared by all training stages. Light: no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdkit.api import Params, Precision, Runtime
from kdkit.api.protocols import DatasetLoader, Loss
from kdkit.api.slots import Component, OneOrMore, Weighted

__all__ = ["OptimParams", "TrainParams"]


class OptimParams(Params):
    """Optimiser and schedule."""

    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly from zero."""
    min_learning_rate: float = Field(0.0, ge=0)
    """Where cosine and linear schedules end."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of matrices; biases and norms are not decayed."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to AdamW's denominator."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients with a larger global norm are scaled down to it."""


class TrainParams(OptimParams):
    """What every training stage takes besides its model and losses. Names are those of ``TrainingArguments``."""

    data: OneOrMore[Weighted[DatasetLoader]]
    """Training rows: one dataset, or a list mixed by ``weight``."""
    eval_data: OneOrMore[Component[DatasetLoader]] | None = None
    """Held-out rows for the loss during training."""
    losses: list[Weighted[Loss]] = Field(min_length=1)
    """Weighted sum of losses; weights are used as they are."""
    max_length: int = Field(1024, ge=2)
    """Longest row in tokens, prompt and answer together."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Rows over ``max_length``: leave them out, or cut the answer (then without its end token)."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the data when ``max_steps`` is not given."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps; overrides ``num_train_epochs``."""
    per_device_train_batch_size: int = Field(8, ge=1)
    """Rows of one micro-batch on one device."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches per optimiser step; the gradient is that of one large batch."""
    padding_free: bool = True
    """Lay the rows of a micro-batch end to end instead of padding them. Same gradient, less work. Models that would see
    across the rows are found out, and get padded rows."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    precision: Precision = "auto"
    """Matrix products in bf16 or fp32; weights and optimiser stay in fp32, and are saved in this precision."""
    logging_steps: Annotated[int, Runtime(), Field(ge=1)] = 10
    """Steps between log lines."""
    save_steps: Annotated[int, Runtime(), Field(ge=1)] = 200
    """Steps between checkpoints; the newest two are kept."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between evaluations of ``eval_data``; by default only at the end."""
    eval_rows: int | None = Field(None, ge=1)
    """At most this many rows of each dataset of ``eval_data``."""
    metric_for_best_model: str | None = None
    """Keep the weights that were best by this evaluation value: ``loss`` or the name of a loss that held-out rows are
    measured by; lower is better."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better ``metric_for_best_model``."""

    @model_validator(mode="after")
    def _evaluation_is_possible(self) -> TrainParams:
        if self.eval_data is None:
            for name in ("eval_steps", "eval_rows", "metric_for_best_model", "early_stopping_patience"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs eval_data")
        if self.metric_for_best_model and not self.eval_steps:
            raise ValueError("metric_for_best_model needs eval_steps")
        if self.early_stopping_patience and not self.metric_for_best_model:
            raise ValueError("early_stopping_patience needs metric_for_best_model")
        if self.metric_for_best_model and self.metric_for_best_model not in self.evaluated:
            raise ValueError(f"metric_for_best_model is one of {', '.join(sorted(self.evaluated))}")
        return self

    @property
    def evaluated(self) -> set[str]:
        """Names of the values that held-out rows have."""
        return {"loss", *(loss.name for loss in self.losses)}

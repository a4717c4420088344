"""Models under test: loading them, and the facts that stand beside their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kdkit.models.chat import ChatEncoder
from kdkit.models.heads import verify_split
from kdkit.models.load import load_model, load_tokenizer, vocabulary
from kdkit.models.quantized.tensors import weight_bytes
from kdkit.models.save import read_provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdkit.api import Model, StageContext
    from kdkit.plugins.stages.plugin import EvaluateParams

__all__ = ["Subject", "facts", "load_subject"]


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model under test."""

    name: str
    artifact: Model
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: ChatEncoder


def load_subject(name: str, artifact: Model, params: EvaluateParams, ctx: StageContext) -> Subject:
    """The model on the stage's device, in evaluation mode. Raises ``ModelError`` when it cannot be loaded."""
    dtype = torch.bfloat16 if ctx.precision(params.precision) == "bf16" else torch.float32
    tokenizer = load_tokenizer(artifact)
    model = load_model(artifact, dtype=dtype).to(ctx.device)
    verify_split(model)
    return Subject(name, artifact, model, tokenizer, ChatEncoder(tokenizer))


def facts(subject: Subject) -> dict[str, Any]:
    """Where the model comes from, its size, how many tokens kdkit trained it on, and what its tokens are."""
    artifact = subject.artifact
    return {
        # A stage's output is where it lies; anything else is what the recipe calls it.
        "path": str(artifact.path) if artifact.name.startswith("${") else artifact.name,
        "parameters": subject.model.num_parameters(),
        "bytes": _weight_bytes(subject),
        "trained_tokens": int(read_provenance(artifact.path).get("trained_tokens", 0)),
        # Numbers per token compare only between models with the same tokens.
        "vocabulary": vocabulary(subject.tokenizer, subject.model).fingerprint,
    }


def _weight_bytes(subject: Subject) -> int:
    """Bytes of the weights on disk; of the weights in memory for a model that is pruned while loading."""
    if subject.artifact.keep_layers is not None:
        return sum(p.numel() * p.element_size() for p in subject.model.parameters())
    return weight_bytes(subject.artifact.path)

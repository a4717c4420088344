"""Models under test: loading them, and the facts that stand beside their scores."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from kdkit.models.chat import ChatEncoder
from kdkit.models.heads import verify_split
from kdkit.models.load import load_model, load_tokenizer, vocabulary
from kdkit.models.quantized.form import read_form
from kdkit.models.quantized.tensors import weight_bytes
from kdkit.models.save import read_provenance
from kdkit.report.scores import QuantizationFacts

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
    load_seconds: float | None = None


def load_subject(name: str, artifact: Model, params: EvaluateParams, ctx: StageContext) -> Subject:
    """The model on the stage's device, in evaluation mode. Raises ``ModelError`` when it cannot be loaded."""
    dtype = torch.bfloat16 if ctx.precision(params.precision) == "bf16" else torch.float32
    tokenizer = load_tokenizer(artifact)
    started = time.perf_counter()
    model = load_model(artifact, dtype=dtype).to(ctx.device)
    seconds = time.perf_counter() - started
    verify_split(model)
    return Subject(name, artifact, model, tokenizer, ChatEncoder(tokenizer), seconds)


def facts(subject: Subject) -> dict[str, Any]:
    """Where the model comes from, its size, how many tokens kdkit trained it on, and what its tokens are."""
    artifact = subject.artifact
    quantization = _quantization(artifact)
    return {
        # A stage's output is where it lies; anything else is what the recipe calls it.
        "path": str(artifact.path) if artifact.name.startswith("${") else artifact.name,
        "parameters": subject.model.num_parameters(),
        "bytes": _weight_bytes(subject),
        "kernel": kernel(subject),
        "trained_tokens": int(read_provenance(artifact.path).get("trained_tokens", 0)),
        # Numbers per token compare only between models with the same tokens.
        "vocabulary": vocabulary(subject.tokenizer, subject.model).fingerprint,
        **({"quantization": quantization} if quantization else {}),
    }


def kernel(subject: Subject) -> str:
    """What multiplies: ``torch float32 on cpu``; of a quantised model it says that it was dequantised for that."""
    model: Any = subject.model
    name = f"torch {str(model.dtype).removeprefix('torch.')} on {model.device.type}"
    return name if subject.artifact.format == "full" else f"{name}, dequantised"


def _quantization(artifact: Model) -> dict[str, Any] | None:
    """What the quantizer wrote beside the model, or what the checkpoint of another program says; None for others."""
    if artifact.format not in {"gptq", "gguf"}:
        return None
    try:
        known = QuantizationFacts.model_validate(read_provenance(artifact.path).get("quantization"))
    except ValidationError:
        known = None
    if known is None and artifact.format == "gptq":
        form = read_form(artifact.path)
        known = QuantizationFacts(quantizer="gptq", bits=form.bits, group_size=form.group_size)
    return (known or QuantizationFacts(quantizer=artifact.format)).model_dump()


def _weight_bytes(subject: Subject) -> int:
    """Bytes of the weights on disk; of the weights in memory for a model that is pruned while loading."""
    if subject.artifact.keep_layers is not None:
        return sum(p.numel() * p.element_size() for p in subject.model.parameters())
    return weight_bytes(subject.artifact.path)

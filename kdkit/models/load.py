"""Loading a model artifact for training or scoring, and telling whether two models speak the same tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdkit.api.artifacts import Model
from kdkit.api.errors import ModelError
from kdkit.models.locate import check_directory
from kdkit.models.pretrained import read_model, read_tokenizer
from kdkit.models.prune import keep_layers, parse_keep_layers

__all__ = ["Vocabulary", "check_same_vocabulary", "load_model", "load_tokenizer", "token_fingerprint", "vocabulary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What makes the token ids of two models comparable.

    Attributes:
        size: Rows of the output projection; often padded beyond the tokenizer.
        tokens: Tokens the tokenizer knows, added ones included.
        fingerprint: sha256 (hex) of the whole map from token to id, added tokens included.
    """

    size: int
    tokens: int
    fingerprint: str


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to ``model``.

    Raises:
        ModelError: The directory is not a complete model, or its tokenizer cannot be loaded.
        EnvironmentUnmet: The tokenizer needs a package that is not installed.
    """
    check_directory(model.path, where=model.name or None)
    return read_tokenizer(model.path, trust_remote_code=model.trust_remote_code)


def load_model(model: Model, *, dtype: torch.dtype, train: bool = False) -> PreTrainedModel:
    """The causal language model of ``model`` on the CPU, with ``model.keep_layers`` applied.

    Quantised models (GPTQ, GGUF) are dequantised: every weight is the number that its code stands for.

    Args:
        model: The artifact; its own code runs only when it says ``trust_remote_code``.
        dtype: Precision of the weights in memory: float32 masters for training, bfloat16 for inference.
        train: In training mode with gradients; otherwise in evaluation mode without.

    Raises:
        ModelError: The directory is not a complete, readable model, or ``keep_layers`` does not
            fit it.
        EnvironmentUnmet: The model needs a package that is not installed.
    """
    if model.format == "adapter":
        raise ModelError(
            f"a model of format {model.format!r} cannot be loaded here",
            where=model.name or str(model.path),
            allowed="a full save_pretrained directory, a GPTQ checkpoint or a GGUF file",
        )
    check_directory(model.path, where=model.name or None)
    loaded = _read(model, dtype)
    if model.keep_layers is not None:
        total = loaded.config.get_text_config().num_hidden_layers
        keep_layers(loaded, parse_keep_layers(model.keep_layers, total))
    loaded.train(train)
    return loaded.requires_grad_(train)


def _read(model: Model, dtype: torch.dtype) -> PreTrainedModel:
    if model.format == "gptq":
        from kdkit.models.quantized.reading import load_gptq

        return load_gptq(model.path, dtype=dtype, trust_remote_code=model.trust_remote_code)
    if model.format == "gguf":
        from kdkit.models.gguf_directory import read_gguf_directory

        return read_gguf_directory(model.path, dtype=dtype)
    return read_model(model.path, dtype=dtype, trust_remote_code=model.trust_remote_code)


def vocabulary(tokenizer: PreTrainedTokenizerBase, model_or_config: PreTrainedModel | PreTrainedConfig) -> Vocabulary:
    """The vocabulary of a tokenizer together with the output rows of its model.

    Raises:
        ModelError: The model has no output projection.
    """
    size = _output_rows(model_or_config)
    return Vocabulary(size=size, tokens=len(tokenizer), fingerprint=token_fingerprint(tokenizer))


def token_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of the whole map from token to id, added tokens included."""
    # Sorted by id, then token: some tokenizers give one id to several spellings.
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    text = json.dumps(pairs, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _output_rows(model_or_config: PreTrainedModel | PreTrainedConfig) -> int:
    if isinstance(model_or_config, PreTrainedConfig):
        return int(model_or_config.get_text_config().vocab_size)
    head = model_or_config.get_output_embeddings()
    if head is None:
        raise ModelError("has no output projection", where=type(model_or_config).__name__)
    return int(head.weight.shape[0])


def check_same_vocabulary(student: Vocabulary, teacher: Vocabulary) -> int:
    """Number of leading logits that mean the same tokens in both models.

    Heads of one model family are often padded to different widths (Qwen2.5: 151,936 or 152,064 rows for one
    tokenizer); both are then cut to the narrower one.

    Raises:
        ModelError: The tokenizers differ.
    """
    if student.fingerprint != teacher.fingerprint:
        raise ModelError(
            "student and teacher have different vocabularies: "
            f"student {_describe(student)}, teacher {_describe(teacher)}",
            hint="token losses compare logits id by id, so they need a teacher that shares the student's tokenizer; "
            "take another teacher, or let this one write answers in a generate stage and train on them",
        )
    return min(student.size, teacher.size)


def _describe(vocab: Vocabulary) -> str:
    return f"{vocab.tokens:,} tokens and {vocab.size:,} logits (map {vocab.fingerprint[:8]})"

"""Saving a model so that plain transformers loads it, with where it came from beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkit.api.errors import ModelError
from kdkit.models.files import settle, write_errors
from kdkit.models.pretrained import write_pretrained

__all__ = ["PROVENANCE_FILE", "read_provenance", "save_into", "save_model"]

PROVENANCE_FILE: Final = "kdkit.json"


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dest: Path,
    *,
    dtype: torch.dtype,
    card: str | None,
    provenance: Mapping[str, Any],
) -> None:
    """Write ``model`` and ``tokenizer`` to ``dest`` as ``save_pretrained`` does, durably (fsync) and readable (0644).

    Args:
        model: A causal language model, not wrapped for distribution; it is not changed.
        tokenizer: Its tokenizer.
        dest: Directory; made if absent, files of the same names are replaced.
        dtype: Precision on disk, also recorded in config.json so that ``from_pretrained`` loads it so.
        card: Text of README.md; None writes none.
        provenance: Facts for ``kdkit.json`` as JSON values (``trained_tokens``, ``parameters``, ...).

    Raises:
        StageError: A weight is not finite; nothing is written.
        EnvironmentUnmet: The disk is full or ``dest`` cannot be written.
    """
    with write_errors(dest):
        dest.mkdir(parents=True, exist_ok=True)
        save_into(model, tokenizer, dest, dtype=dtype, card=card, provenance=provenance)
        settle(dest)


def save_into(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dest: Path,
    *,
    dtype: torch.dtype,
    card: str | None,
    provenance: Mapping[str, Any],
) -> None:
    """:func:`save_model` for a directory that the caller makes, syncs and guards (``files.staged``)."""
    write_pretrained(model, tokenizer, dest, dtype=dtype)
    if card is not None:
        (dest / "README.md").write_text(card, encoding="utf-8")
    facts = json.dumps(dict(provenance), indent=2, sort_keys=True, allow_nan=False)
    (dest / PROVENANCE_FILE).write_text(facts + "\n", encoding="utf-8")


def read_provenance(path: Path) -> dict[str, Any]:
    """The facts kdkit saved beside the model in ``path``; empty for a model from elsewhere.

    Raises:
        ModelError: The file is there but is not a JSON object.
    """
    file = path / PROVENANCE_FILE
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"is not JSON: {error}", where=str(file)) from error
    if not isinstance(facts, dict):
        raise ModelError("is not a JSON object", where=str(file))
    return facts

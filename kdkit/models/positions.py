"""How long the rows of a model may be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["learned_positions", "positions"]

_OFFSET: Final = 4
"""Rows that a table of position embeddings may have beyond the positions: OPT has 2."""


def positions(config: Any) -> int | None:
    """How many tokens a model reads, by its configuration; None where that sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def learned_positions(model: PreTrainedModel) -> int | None:
    """The same of a model with a table of position embeddings (GPT-2, OPT), which cannot read further; else None."""
    limit, words = positions(model.config), model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    return limit if limit is not None and any(limit <= size <= limit + _OFFSET for size in tables) else None

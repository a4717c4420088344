"""Which layers of a model are quantised: the linear ones of its decoder blocks, and the output projection if asked."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from kdkit.api.errors import ModelError
from kdkit.models.prune import decoder

__all__ = ["blocks", "quantizable"]


def blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Names (as in ``named_modules``) and modules of the decoder blocks, in order.

    Raises:
        ModelError: They cannot be told from the model's other modules.
    """
    total = model.config.get_text_config().num_hidden_layers
    owner, name = decoder(model, total)
    prefix = next(path for path, module in model.named_modules() if module is owner)
    start = f"{prefix}.{name}" if prefix else name
    return [(f"{start}.{index}", block) for index, block in enumerate(getattr(owner, name))]


def quantizable(model: PreTrainedModel, *, lm_head: bool) -> dict[str, nn.Linear]:
    """The layers to quantise by name, in the order of the model.

    Args:
        model: A causal language model.
        lm_head: Add the output projection, last.

    Returns:
        Every ``nn.Linear`` of the decoder blocks; embeddings, norms and biases are left alone.

    Raises:
        ModelError: A block has other weights (convolutions, stacked experts, ...), shares a weight with another block,
            or the output projection is to be quantised but is the embedding's.
    """
    found: dict[str, nn.Linear] = {}
    for prefix, block in blocks(model):
        found.update(_linears(model, prefix, block))
    if not found:
        raise ModelError("has no linear layers in its decoder blocks", where=type(model).__name__)
    names: dict[int, str] = {}
    for name, linear in found.items():
        first = names.setdefault(id(linear.weight), name)
        if first != name:
            raise ModelError(f"shares its weight with {first}, which cannot be quantised", where=name)
    if lm_head:
        name, head = _head(model)
        found[name] = head
    return found


def _linears(model: PreTrainedModel, prefix: str, block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in block.named_modules():
        name = f"{prefix}.{path}" if path else prefix
        if type(module) is nn.Linear:
            yield name, module
            continue
        for own, weight in module.named_parameters(recurse=False):
            # Vectors (norms, biases, gates of one value for each channel) stay in 16 bits; nothing else is left over.
            if weight.dim() > 1:
                raise ModelError(
                    f"{type(module).__name__}.{own} of shape {list(weight.shape)} is not a linear layer and cannot be "
                    "quantised",
                    where=f"{type(model).__name__} {name}",
                    allowed="decoder blocks whose matrices are all torch.nn.Linear (Llama, Qwen, Gemma, Mistral, ...)",
                )


def _head(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    head = model.get_output_embeddings()
    name = next((path for path, module in model.named_modules() if module is head), "")
    if type(head) is not nn.Linear:
        raise ModelError("its output projection is not a linear layer and cannot be quantised", where=name or None)
    embedding = model.get_input_embeddings()
    if embedding is not None and embedding.weight is head.weight:
        raise ModelError(
            "its output projection is the embedding itself (tied), which stays in 16 bits: quantising it would store "
            "both and make the model larger",
            where=name,
            hint="set lm_head: false",
        )
    return name, head

"""Depth pruning: a smaller model made of some of the decoder layers of a larger one."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kdkit.api.artifacts import KeepLayers
from kdkit.api.errors import ModelError
from kdkit.models.files import staged
from kdkit.models.pretrained import read_model, read_tokenizer
from kdkit.models.save import save_into

__all__ = ["keep_layers", "parse_keep_layers", "prune"]

_EVERY: Final = re.compile(r"every-(\d+)(?:st|nd|rd|th)")
_PER_LAYER: Final = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
"""Configuration lists with one entry for each layer."""
_LAYER_INDICES: Final = ("mlp_only_layers",)
"""Configuration lists of layer indices."""


def parse_keep_layers(value: KeepLayers, total: int) -> tuple[int, ...]:
    """Which of ``total`` decoder layers to keep, as ascending indices from 0.

    * A count ``n`` (2 to ``total``): ``n`` layers evenly spaced from the first to the last, both included; the i-th is
      ``i * (total - 1) / (n - 1)`` rounded to the nearest index, halves up. 20 of 30 keeps 0, 2, 3, 5, 6, 8, ... 29.
    * ``"every-Nth"`` (``every-2nd``, ``every-3rd``; N below ``total``): 0, N, 2N, ...; not always the last layer.
    * Explicit indices: as given; distinct, ascending, between 0 and ``total - 1``.

    Raises:
        ModelError: Anything else.
    """
    if isinstance(value, bool):
        raise _refused(value, total)
    if isinstance(value, int):
        return _spaced(value, total)
    if isinstance(value, str):
        match = _EVERY.fullmatch(value)
        step = int(match[1]) if match else 0
        if not 2 <= step < total:
            raise _refused(value, total)
        return tuple(range(0, total, step))
    return _explicit(value, total)


def _spaced(count: int, total: int) -> tuple[int, ...]:
    if count == total:
        return tuple(range(total))
    if not 2 <= count < total:
        raise _refused(count, total)
    gaps = count - 1
    # Integers only: round() rounds halves to even, which would depend on where in the model the half falls.
    return tuple((2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(count))


def _explicit(value: Sequence[int], total: int) -> tuple[int, ...]:
    layers = tuple(value)
    if not layers or any(isinstance(index, bool) or not isinstance(index, int) for index in layers):
        raise _refused(value, total)
    ascending = all(low < high for low, high in pairwise(layers))
    if not ascending or layers[0] < 0 or layers[-1] >= total:
        raise _refused(value, total)
    return layers


def _refused(value: object, total: int) -> ModelError:
    return ModelError(
        f"keep_layers cannot be {list(value) if isinstance(value, tuple) else value!r} for a model of {total} layers",
        allowed=f"a count from 2 to {total}, every-Nth (every-2nd, every-3rd, ...; N below {total}), "
        f"or distinct ascending indices from 0 to {total - 1}",
    )


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Drop all decoder layers of ``model`` but ``layers``, in place.

    The configuration and the index that each attention layer uses in the KV cache follow, so that the model trains,
    generates and reloads like one that was built with this depth.

    Raises:
        ModelError: The decoder layers cannot be found, or the architecture has something else that depends on depth.
    """
    config = model.config.get_text_config()
    chosen = _explicit(layers, config.num_hidden_layers)
    owner, name = decoder(model, config.num_hidden_layers)
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError("shares keys and values between layers and cannot be pruned", where=type(model).__name__)
    old = getattr(owner, name)
    setattr(owner, name, nn.ModuleList(old[index] for index in chosen))
    for new_index, layer in enumerate(getattr(owner, name)):
        for module in layer.modules():
            # The KV cache is a list by layer_idx: gaps in it break cached generation, or crash it.
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = new_index
    _prune_config(config, chosen)
    _check_rebuilds(model)


def decoder(model: PreTrainedModel, total: int) -> tuple[nn.Module, str]:
    """The module that owns the list of decoder layers, and the list's attribute name."""
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    # Lists inside a layer (experts) can have the same length as the model is deep.
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ModelError(
            f"cannot tell which modules are the {total} decoder layers ({', '.join(outer) or 'none found'})",
            where=type(model).__name__,
            hint="layer pruning supports decoders with one list of layers (Llama, Qwen, Gemma, Mistral, GPT-2, ...)",
        )
    owner, _, name = outer[0].rpartition(".")
    return model.get_submodule(owner), name


def _prune_config(config: PreTrainedConfig, chosen: tuple[int, ...]) -> None:
    stored = vars(config)  # not getattr: some architectures compute these lists from others and refuse to set them
    for key in _PER_LAYER:
        if isinstance(stored.get(key), list | tuple):
            setattr(config, key, [stored[key][index] for index in chosen])
    for key in _LAYER_INDICES:
        if isinstance(stored.get(key), list | tuple):
            setattr(config, key, [new for new, old in enumerate(chosen) if old in stored[key]])
    config.num_hidden_layers = len(chosen)


def _check_rebuilds(model: PreTrainedModel) -> None:
    """A model built from the new configuration must have exactly the weights that are left."""
    with torch.device("meta"):
        rebuilt = type(model)(copy.deepcopy(model.config))
    have = {name: tensor.shape for name, tensor in model.state_dict().items()}
    want = {name: tensor.shape for name, tensor in rebuilt.state_dict().items()}
    if have != want:
        odd = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        raise ModelError(
            f"cannot be pruned: its configuration does not describe the layers that are left ({odd[0]})",
            where=type(model).__name__,
        )


def prune(src: Path, dest: Path, layers: KeepLayers) -> tuple[int, ...]:
    """Write a copy of the model in ``src`` that keeps only ``layers``; it loads with plain transformers.

    Args:
        src: Directory of the full model.
        dest: Directory to make; written whole or not at all.
        layers: What :func:`parse_keep_layers` accepts.

    Returns:
        The layers that were kept.

    Raises:
        ModelError: ``src`` cannot be loaded or pruned that way, or ``dest`` exists.
        EnvironmentUnmet: The disk is full or ``dest`` cannot be written.
    """
    tokenizer, model = read_tokenizer(src), read_model(src, dtype="auto")
    chosen = parse_keep_layers(layers, model.config.get_text_config().num_hidden_layers)
    keep_layers(model, chosen)
    with staged(dest) as directory:
        save_into(
            model,
            tokenizer,
            directory,
            dtype=model.dtype,
            card=None,
            provenance={"kept_layers": list(chosen), "parameters": model.num_parameters(), "trained_tokens": 0},
        )
    return chosen

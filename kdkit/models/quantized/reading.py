"""Loading a GPTQ checkpoint as an ordinary model: every weight as the floating-point number that its code stands for.

That needs no kernel, so it runs on every machine, and the result is what the kernels compute up to their rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from kdkit.api.errors import ModelError
from kdkit.models.pretrained import load_errors, quiet
from kdkit.models.quantized.checkpoint import check_fits, outline, read_layers
from kdkit.models.quantized.form import read_form
from kdkit.models.quantized.packing import PARTS
from kdkit.models.quantized.tensors import StoredTensors

__all__ = ["load_gptq"]


def load_gptq(path: Path, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model in ``path`` in evaluation mode, dequantised to ``dtype``.

    Raises:
        ModelError: It is no GPTQ checkpoint, or its tensors do not fit each other or the configuration.
        EnvironmentUnmet: It needs a package that is not installed.
    """
    form = read_form(path)
    with StoredTensors(path) as stored:
        empty = outline(path, tensors=len(stored.names), trust_remote_code=trust_remote_code)
        layers = read_layers(stored, form, path)
        check_fits(empty, layers, path)
        packed = {f"{name}.{part}" for name in layers for part in PARTS}
        state: dict[str, Tensor] = {name: stored.read(name) for name in stored.names if name not in packed}
    for name in list(layers):
        state[f"{name}.weight"] = layers.pop(name).dequantized(dtype)
    return _assembled(empty, state, path, dtype)


def _assembled(empty: PreTrainedModel, state: dict[str, Tensor], path: Path, dtype: torch.dtype) -> PreTrainedModel:
    cls: Any = type(empty)
    with quiet(), load_errors(path, "model"):
        model, info = cls.from_pretrained(
            None, config=empty.config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"the weights lack {missing[0]} ({len(missing)} tensors are missing)", where=str(path))
    model.config._name_or_path = str(path)  # noqa: SLF001 (what from_pretrained of a directory does)
    return model.eval()

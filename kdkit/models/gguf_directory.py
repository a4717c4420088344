"""A directory with a GGUF file and the config.json of its model: what the ``gguf`` quantizer writes.

The configuration says all that transformers' reader of GGUF leaves out (biases of Llama, rotary scaling, Gemma 1), so
the weights are put back into the model that it describes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from kdkit.api.errors import ModelError
from kdkit.models.gguf_import import read_gguf, require_gguf
from kdkit.models.gguf_layout import Family, export_tensors, family_named
from kdkit.models.pretrained import load_errors, quiet, read_config

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

__all__ = ["read_gguf_directory"]


def read_gguf_directory(path: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model in ``path``, dequantised, in evaluation mode.

    Raises:
        ModelError: There is not one GGUF file, or it is not the model that config.json describes.
        EnvironmentUnmet: The ``gguf`` package is missing.
    """
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"has {len(files)} GGUF files", where=str(path), allowed="one")
    require_gguf()
    config = read_config(path)
    family = family_named(config.model_type)
    if family is None:
        return read_gguf(files[0])[0].to(dtype)
    with quiet(), load_errors(files[0], "GGUF file"):
        return _read(files[0], config, family).to(dtype).eval()


def _read(file: Path, config: PreTrainedConfig, family: Family) -> PreTrainedModel:
    from gguf import GGUFReader

    reader = GGUFReader(file)
    _check_architecture(reader, family, file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {}
    for entry in export_tensors(model, family, str(file)):
        tensor = stored.pop(entry.name, None)
        if tensor is None:
            raise ModelError(f"the GGUF file lacks {entry.name}", where=str(file))
        if entry.restore is not None:
            state[entry.source] = entry.restore(_values(tensor, entry.shape, file))
    if stored:
        unknown = f"the GGUF file has {min(stored)}, which is no part of the model in config.json"
        raise ModelError(unknown, where=str(file))
    # Every weight was asked for above; a tied head is the token table itself.
    model.load_state_dict(state, strict=False)
    if (file.parent / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(file.parent, local_files_only=True)
    return model


def _check_architecture(reader: GGUFReader, family: Family, file: Path) -> None:
    field = reader.get_field("general.architecture")
    found = None if field is None else str(field.contents())
    if found != family.arch:
        raise ModelError(f"is a model of {found!r}, config.json says {family.arch!r}", where=str(file))


def _values(tensor: ReaderTensor, shape: tuple[int, ...], file: Path) -> torch.Tensor:
    from gguf.quants import dequantize

    # A copy: the file is mapped into memory, and what lies there cannot be written.
    values = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
    if tuple(values.shape) != shape:
        raise ModelError(f"{tensor.name} is {list(values.shape)}, config.json says {list(shape)}", where=str(file))
    return values
